# SPDX-License-Identifier: Apache-2.0
"""Every launch script parses, and what it would run is accepted: its commands are recorded by a `build.sh` that starts nothing."""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tandem_cli.main import SUBCOMMANDS
from tandem_cli.serve import command_serve, omni, options
from tandem_cli.serve.fleet import Fleet, Hardware
from tandem_cli.serve.omni_environment import OmniEnvironment
from tandem_cli.serve.options import ServeOptions, parse_options
from tandem_worker.connectors import transfer_config

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*/*.sh"))
LAUNCHERS = sorted((ROOT / "examples" / "launch").glob("*.sh"))
RECORDER = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
"""
EXPECTED = {
    "agg": ["vllm"], "disagg": ["prefill", "decode", "disagg"], "disagg_same_gpu": ["prefill", "decode", "disagg"],
    "agg_router": ["vllm", "vllm_1", "router"], "agg_router_approx": ["vllm", "vllm_1", "router"],
    "agg_router_replicas": ["vllm", "vllm_1", "router", "router"],
    "disagg_router": ["prefill", "prefill_1", "decode", "decode_1", "disagg", "disagg_1", "router"],
    "agg_kvbm": ["vllm"], "disagg_kvbm": ["prefill", "decode", "disagg"], "agg_lmcache": ["vllm"], "agg_spec_decoding": ["vllm"],
    "agg_spec_decoding_eagle3": ["vllm"],
    "agg_multimodal_epd": ["vllm", "encode", "encode_agg"],
    "disagg_multimodal_epd": ["prefill", "decode", "encode", "disagg", "encode_disagg", "router"],
    "agg_lora": ["vllm"], "agg_omni": ["omni"], "dep": ["vllm", "router"],
}
"""The models of each script, over all servers that it starts."""
OMNI = OmniEnvironment("/omni", sys.version_info[:2], {"vllm": "0.30.0", "vllm-omni": "0.30.0", "torch": "2.13.0", "numpy": "1.26.4"},
                       platforms=("cpu",))


@dataclass(frozen=True)
class Recorded:
    """One command of a script: `./build.sh ARGUMENTS` and the environment that it had."""

    arguments: list[str]
    environment: dict[str, str]


def record(script: Path, folder: Path, *arguments: str) -> list[Recorded]:
    """Runs a script with a recorder in place of build.sh and curl."""
    launch = folder / "examples" / "launch"
    launch.mkdir(parents=True)
    shutil.copy(script, launch / script.name)
    for path in (folder / "build.sh", folder / "bin" / "curl"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(RECORDER.format(python=sys.executable))
        path.chmod(0o755)
    environment = {**os.environ, "RECORD": str(folder / "record"), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    subprocess.run([launch / script.name, *arguments], env=environment, check=True, capture_output=True, timeout=60)
    lines = (folder / "record").read_text().splitlines()
    return [Recorded(*json.loads(line)) for line in lines]


def given(script: Path, folder: Path) -> list[str]:
    """What a script asks for before all options: an adapter's folder, an image's file."""
    own = {"agg_lora": folder, "agg_omni": folder, "agg_multimodal_epd": script, "disagg_multimodal_epd": script}.get(script.stem)
    return [] if own is None else [str(own)]


def serve_options(command: Recorded, monkeypatch: pytest.MonkeyPatch) -> ServeOptions:
    """The options of a recorded `serve`, as the launcher parses them."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    options.add_arguments(parser)
    args, args.passthrough = parser.parse_known_args(command.arguments[1:])
    with monkeypatch.context() as patch:
        for name, value in command.environment.items():
            patch.setenv(name, value)
        return parse_options(args)


def planned(serve: ServeOptions, gpus: int, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """The fleet on a host of many cores where every connector and vllm-omni are installed, with the settings of every worker resolved."""
    monkeypatch.setattr(command_serve, "transfer_config", functools.partial(transfer_config, installed=lambda _: True))
    monkeypatch.setattr(command_serve, "probe", lambda _: OMNI)
    monkeypatch.setattr(omni, "known_arguments", lambda _: frozenset({"max_model_len"}))
    fleet = command_serve._plan(serve, Hardware(tuple(range(16)), gpus))
    for worker in fleet.workers:
        command_serve._settings(worker, serve)
    return fleet


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_sound(script: Path) -> None:
    """It parses, is executable, strict, short, and has the licence; shellcheck finds nothing where it is installed."""
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script], check=False, timeout=60).returncode == 0
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# SPDX-License-Identifier: Apache-2.0\n")
    assert "set -Eeuo pipefail" in text
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False, timeout=60)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launch_script_is_accepted_by_the_launcher(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `serve` of it parses, on CPUs and on GPUs, and plans the models that the script is about; options of the caller come last."""
    first = given(script, tmp_path)
    commands = record(script, tmp_path, *first, "--max-model-len", "2048")
    serves = [serve_options(one, monkeypatch) for one in commands if one.arguments[0] == "serve"]
    assert all(serve.detach for serve in serves)
    assert serves[0].engine_arguments["max_model_len"] == 2048
    for gpus in (0, 8):
        models = [name for serve in serves for name in planned(serve, gpus, monkeypatch).model_names]
        assert models == EXPECTED[script.stem]


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launch_script_asks_something(script: Path, tmp_path: Path) -> None:
    """After the servers comes a request that the command accepts, to a model that is there."""
    first = given(script, tmp_path)
    commands = [one.arguments for one in record(script, tmp_path, *first)]
    asked = [one for one in commands if one[0] == "tandem"]
    for command in asked:
        parse_command(command[1:])
    models = [command[command.index("--model") + 1] for command in asked if command[1] == "generate"]
    assert set(models) <= set(EXPECTED[script.stem])
    urls = [word for command in commands for word in command if "/v2/models/" in word]
    assert models or urls
    assert {url.split("/v2/models/")[1].split("/")[0] for url in urls} <= set(EXPECTED[script.stem])


def parse_command(arguments: list[str]) -> argparse.Namespace:
    """Arguments of a subcommand of `tandem`, by its own parser."""
    module: Any = import_module(SUBCOMMANDS[arguments[0]].module)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module.add_arguments(parser)
    return parser.parse_args(arguments[1:])


def test_every_launch_script_is_in_the_table() -> None:
    """examples/README.md lists what is there, and nothing else."""
    readme = (ROOT / "examples" / "README.md").read_text()
    listed = {line.split("`")[1].split()[0] for line in readme.splitlines() if line.startswith("| `")}
    assert listed == {script.name for script in LAUNCHERS}
