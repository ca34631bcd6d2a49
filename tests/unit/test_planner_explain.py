# SPDX-License-Identifier: Apache-2.0
"""A decision in words, and `tandem plan`."""

import json
from pathlib import Path

import pytest

from planner_rig import Engine, pools, steady
from tandem_cli.main import main
from tandem_planner.config import PlannerConfig
from tandem_planner.explain import lines, number, one_line
from tandem_planner.plan import Planner
from tandem_planner.profile_data import write_profile
from tandem_planner.terms import Observation


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """The folder of a profile."""
    write_profile(Engine().profile(loads=16), tmp_path)
    return str(tmp_path)


def test_every_term_is_told_once() -> None:
    """By pool, with its value and how it came about; the log has all in one line."""
    config = PlannerConfig(ttft=200, itl=12, osl=300, adjustment_interval=60, worker_start=0)
    decision = Planner(config, Engine().profile()).decide(Observation(60, pools(2, 1), steady(20)))
    told = list(lines(decision))
    assert told[0] == decision.reason
    assert [line for line in told if not line.startswith(" ")][1:] == ["traffic and budget:", "prefill:", "decode:"]
    assert sum(line.startswith("  ") for line in told) == len(decision.terms)
    assert all(f"{'' if term.role is None else term.role.value + '.'}{term.name}={number(term.value)}" in one_line(decision)
               for term in decision.terms)
    assert "\n" not in one_line(decision)


def test_plan_answers_in_one_line(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts, GPUs and the budget; what the budget cuts is said."""
    assert main(["plan", "--profile", profile, "--rate", "40", "--osl", "300", "--ttft", "200", "--itl", "12"]) == 0
    assert capsys.readouterr().out == "6 prefill, 1 decode: 7 GPUs, of a budget of 8\n"
    assert main(["plan", "--profile", profile, "--rate", "90", "--osl", "300", "--ttft", "200", "--itl", "12"]) == 0
    assert "wanted, but the budget is used up" in capsys.readouterr().out


def test_plan_explains_and_speaks_json(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every term, in words and for programs."""
    arguments = ["plan", "--profile", profile, "--rate", "40", "--osl", "300", "--ttft", "200", "--itl", "12", "--gpus=-1", "--cached=0.5"]
    assert main([*arguments, "--explain"]) == 0
    told = capsys.readouterr().out
    assert "prefill_offered" in told
    assert "engines always busy" in told
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["target"]["prefill"] < 6
    assert [term["value"] for term in answer["terms"] if term["name"] == "cached_fraction"] == [0.5]


@pytest.mark.parametrize(("more", "sentence"), [
    (["--ttft", "50"], "TTFT 50 ms is not reachable at ISL 3000: the profile's best is 95 ms"),
    (["--gpus", "1"], "the fewest workers need 2 GPUs"),
])
def test_plan_refuses_what_cant_be_had(profile: str, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the exit code of a misuse."""
    assert main(["plan", "--profile", profile, "--rate", "10", *more]) == 2
    assert sentence in capsys.readouterr().err


def test_plan_wants_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a missing one."""
    assert main(["plan", "--profile", str(tmp_path / "none"), "--rate", "10"]) == 2
    assert "is not a folder" in capsys.readouterr().err
