# SPDX-License-Identifier: Apache-2.0
"""Writes the model repository of one run, from the shipped `model_repository/` and the fleet's plan."""

import json
import shutil
from pathlib import Path

from tandem_cli.serve.fleet import ROUTER, EnsemblePlan, Fleet, WorkerPlan
from tandem_protocol.roles import Role

TEMPLATES = {Role.AGGREGATED: "vllm", Role.PREFILL: "prefill", Role.DECODE: "decode", Role.ENCODE: "encode", Role.OMNI: "omni"}


def write_repository(fleet: Fleet, model: str, source: Path, target: Path) -> None:
    """Fills `target`, which is emptied first; `source` is the shipped repository and stays as it is.

    The model's folder or id goes into config.pbtxt too, where clients find it (for its chat template).
    """
    shutil.rmtree(target, ignore_errors=True)
    for worker in fleet.workers:
        _write_worker(worker, model, source / TEMPLATES[worker.role], target / worker.name)
    for ensemble in fleet.ensembles:
        _write_ensemble(ensemble, source / ensemble.template, target / ensemble.name)
    if fleet.routers:
        _write_router(fleet.routers, model, source / ROUTER, target / ROUTER)


def _write_worker(worker: WorkerPlan, model: str, template: Path, folder: Path) -> None:
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = (folder / "config.pbtxt").read_text().splitlines()
    kept = [line for line in config if not line.startswith("name:") and '"worker_index"' not in line]
    parameters = {"model": model, "worker_index": str(worker.index), "gpus": worker.gpus, "cpu_cores": worker.cores,
                  "EXECUTION_ENV_PATH": worker.execution_env}
    added = [f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in parameters.items() if value]
    (folder / "config.pbtxt").write_text("\n".join([f'name: "{worker.name}"', *kept, *added]) + "\n")
    model_json = folder / "1" / "model.json"
    shipped = json.loads(model_json.read_text()) if model_json.exists() else {}
    model_json.write_text(json.dumps({**shipped, **worker.arguments}, indent=2) + "\n")


def _write_router(instances: int, model: str, template: Path, folder: Path) -> None:
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = folder / "config.pbtxt"
    text = config.read_text().replace("count: 1", f"count: {instances}", 1)
    config.write_text(f'{text}parameters {{ key: "model" value: {{ string_value: "{model}" }} }}\n')


def _write_ensemble(ensemble: EnsemblePlan, template: Path, folder: Path) -> None:
    text = (template / "config.pbtxt").read_text()
    text = text.replace(f'name: "{ensemble.template}"', f'name: "{ensemble.name}"', 1)
    for role, worker in ensemble.steps.items():
        text = text.replace(f'model_name: "{TEMPLATES[role]}"', f'model_name: "{worker}"')
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(text)
