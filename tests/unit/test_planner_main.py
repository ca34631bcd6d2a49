# SPDX-License-Identifier: Apache-2.0
"""The planner's command line: flags before variables before defaults, and a sentence for what can't be."""

import os
import subprocess
import sys

import pytest

from tandem_planner.__main__ import main
from tandem_planner.arguments import parse
from tandem_planner.queries import Source
from tandem_planner.service_config import ConnectorKind
from tandem_planner.terms import Mode
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role


def test_flags_come_before_variables() -> None:
    """For both halves of the settings."""
    environ = {"TANDEM_PLANNER_MODE": "agg", "TANDEM_PLANNER_CONNECTOR": "docker", "TANDEM_PLANNER_METRICS_SOURCE": "dynamo",
               "SCALING_MAX_WAIT_TIME": "60"}
    chosen = parse(["--mode", "decode", "--connector", "kubernetes", "--no-operation"], environ)
    assert (chosen.config.mode, chosen.config.no_operation) == (Mode.DECODE, True)
    assert (chosen.service.connector, chosen.service.metrics_source) == (ConnectorKind.KUBERNETES, Source.DYNAMO)
    assert chosen.service.scale_timeout_s == 60
    assert parse([], environ).config.mode is Mode.AGGREGATED


def test_models_of_a_role_are_words() -> None:
    """With wildcards."""
    chosen = parse(["--triton-decode", "decode_? big*"], {"TANDEM_DISCOVERY": "file:/x"})
    assert chosen.service.triton_patterns[Role.DECODE] == ("decode_?", "big*")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--connector", "triton"), "set TANDEM_DISCOVERY as the workers have it"),
        (("--connector", "virtual"), "set TANDEM_PLANNER_VIRTUAL=etcd://host:port"),
        (("--connector", "virtual", "--virtual-store", "file:/x"), "set TANDEM_PLANNER_VIRTUAL=etcd://host:port"),
        (("--connector", "docker", "--ttft", "-1"), "TANDEM_PLANNER_TTFT"),
        (("--connector", "docker", "--prometheus-endpoint", "prometheus:9090"), "expected http://host:port"),
    ],
)
def test_a_wrong_setting_exits_with_2_and_a_sentence(flags: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is looked at."""
    monkeypatch.delenv("TANDEM_DISCOVERY", raising=False)
    monkeypatch.setattr(sys, "argv", ["planner", *flags])
    assert main() == 2
    assert sentence in capsys.readouterr().err


def test_unknown_connectors_are_refused() -> None:
    """By name."""
    with pytest.raises(ConfigError, match="TANDEM_PLANNER_CONNECTOR='nomad'"):
        parse([], {"TANDEM_PLANNER_CONNECTOR": "nomad"})


@pytest.mark.parametrize(("given", "threads"), [({}, "1"), ({"OPENBLAS_NUM_THREADS": "2"}, "2")])
def test_the_process_begins_without_threads_of_blas_unless_it_is_told_otherwise(given: dict[str, str], threads: str) -> None:
    """numpy reads the variable when it is imported, so it must be set before."""
    program = """if True:
        import os, sys
        assert "numpy" not in sys.modules
        import tandem_planner.__main__
        print("numpy" in sys.modules, os.environ["OPENBLAS_NUM_THREADS"], len(os.listdir("/proc/self/task")) == 1)
    """
    environ = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", program], env={**environ, **given}, capture_output=True, text=True, timeout=60, check=True)
    imported, variable, alone = done.stdout.split()
    assert (imported, variable) == ("True", threads)
    assert alone == "True" or given
