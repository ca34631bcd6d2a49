# SPDX-License-Identifier: Apache-2.0
"""The model repository of a run, parsed back as Triton does."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tandem_cli.serve.fleet import EnsemblePlan, Fleet, WorkerPlan
from tandem_cli.serve.repository import write_repository
from tandem_protocol import tensors
from tandem_protocol.roles import Role

SOURCE = Path(__file__).parents[2] / "model_repository"
FLEET = Fleet(
    workers=(
        WorkerPlan("vllm", Role.AGGREGATED, 0, cores="4,5"),
        WorkerPlan("prefill_1", Role.PREFILL, 2, gpus="0,1", arguments={"max_model_len": 99, "model": "mine"}),
        WorkerPlan("decode_2", Role.DECODE, 5, cores="1"),
        WorkerPlan("encode_1", Role.ENCODE, 6),
    ),
    ensembles=(
        EnsemblePlan("disagg_1", "disagg", {Role.PREFILL: "prefill_1", Role.DECODE: "decode_2"}),
        EnsemblePlan("encode_agg", "encode_agg", {Role.ENCODE: "encode_1", Role.AGGREGATED: "vllm"}),
        EnsemblePlan("encode_disagg", "encode_disagg", {Role.ENCODE: "encode_1", Role.PREFILL: "prefill_1", Role.DECODE: "decode_2"}),
    ),
    routers=2,
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The repository of `FLEET`."""
    target = tmp_path / "models"
    write_repository(FLEET, "org/model", SOURCE, target)
    return target


def load_config(folder: Path) -> Any:
    """A config.pbtxt, as Triton parses it."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_every_planned_model_has_its_folder(repository: Path) -> None:
    """And nothing else has."""
    assert {folder.name for folder in repository.iterdir()} == set(FLEET.model_names)


@pytest.mark.parametrize("name", FLEET.model_names)
def test_a_model_is_named_after_its_folder(repository: Path, name: str) -> None:
    """Triton refuses it otherwise."""
    assert load_config(repository / name).name == name
    assert (repository / name / "1").is_dir()


def test_each_router_instance_is_a_process(repository: Path) -> None:
    """Triton starts a stub per instance."""
    assert load_config(repository / "router").instance_group[0].count == 2


@pytest.mark.parametrize("worker", FLEET.workers, ids=lambda worker: worker.name)
def test_placement_and_role_become_parameters(repository: Path, worker: WorkerPlan) -> None:
    """What is empty is left out."""
    parameters = {name: value.string_value for name, value in load_config(repository / worker.name).parameters.items()}
    expected = {"model": "org/model", "role": worker.role.value, "worker_index": str(worker.index), "gpus": worker.gpus,
                "cpu_cores": worker.cores}
    assert parameters == {name: value for name, value in expected.items() if value}


@pytest.mark.parametrize("worker", FLEET.workers, ids=lambda worker: worker.name)
def test_the_decoupled_policy_is_kept(repository: Path, worker: WorkerPlan) -> None:
    """It is the role's."""
    assert load_config(repository / worker.name).model_transaction_policy.decoupled is tensors.is_decoupled(worker.role)


def test_engine_arguments_are_merged_over_the_shipped_ones(repository: Path) -> None:
    """What isn't given stays."""
    shipped = json.loads((SOURCE / "vllm" / "1" / "model.json").read_text())
    assert json.loads((repository / "vllm" / "1" / "model.json").read_text()) == shipped
    assert json.loads((repository / "prefill_1" / "1" / "model.json").read_text()) == {**shipped, "max_model_len": 99, "model": "mine"}


def test_an_ensemble_refers_to_its_own_workers(repository: Path) -> None:
    """Not to the shipped names, and with all tensors mapped."""
    steps = load_config(repository / "disagg_1").ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["prefill_1", "decode_2"]
    assert {spec.name for spec in (*tensors.REQUEST_INPUTS, tensors.HANDOFF)} == set(steps[1].input_map)
    steps = load_config(repository / "encode_disagg").ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["encode_1", "prefill_1", "decode_2"]


def test_what_was_there_before_is_gone(repository: Path) -> None:
    """A model of an earlier run must not be loaded."""
    (repository / "stale").mkdir()
    write_repository(Fleet(FLEET.workers[:1], ()), "org/model", SOURCE, repository)
    assert [folder.name for folder in repository.iterdir()] == ["vllm"]


def test_compiled_python_is_not_copied(repository: Path) -> None:
    """It would belong to another path."""
    assert list(repository.rglob("__pycache__")) == []
