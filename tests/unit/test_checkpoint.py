# SPDX-License-Identifier: Apache-2.0
"""The life of a worker that is made to be dumped, over real files and a stand-in engine."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sleepers import StubEngine, StubHost
from tandem_cli.serve.checkpoints import checkpoint_was_taken, existing_checkpoint
from tandem_protocol.errors import ConfigError, EngineError, UnavailableError
from tandem_worker.arguments import Platform, complete
from tandem_worker.checkpoint import CheckpointPlan, Lifecycle, Outcome, plan_checkpoint, read_verdict
from tandem_worker.config import WorkerSettings, load_settings
from tandem_worker.sleep import SleepCycle
from tandem_worker.sleep_terms import Abilities
from tandem_worker.status import WorkerState

SUCCESS, FAILURE = '{"success": true}', '{"success": false, "error": "criu: no space left"}'


class DumpableEngine(StubEngine):
    """With vLLM's two methods around a dump."""

    async def checkpoint_prepare(self) -> None:
        """Noted."""
        self._note("prepare")

    async def checkpoint_restore(self) -> None:
        """Noted."""
        self._note("restore")


class QuickHost(StubHost):
    """A host without requests, whose drain takes any bound."""

    async def drain(self, timeout_s: float) -> int:
        """At once."""
        self.state = WorkerState.DRAINING
        return 0


def environment(folder: Path) -> dict[str, str]:
    """All variables, for files in this folder."""
    return {
        "DYN_CHECKPOINT_SIGNAL_FILE": f"{folder}/signal", "DYN_READY_FOR_CHECKPOINT_FILE": f"{folder}/ready",
        "DYN_CHECKPOINT_STORAGE_TYPE": "pvc", "DYN_CHECKPOINT_LOCATION": f"{folder}/location",
        "DYN_RESTORE_MARKER_FILE": f"{folder}/restored", "TANDEM_CHECKPOINT_TIMEOUT_S": "5",
    }


def settings_of(variables: dict[str, str]) -> WorkerSettings:
    """As a worker resolves them."""
    return load_settings({}, variables)


@pytest.fixture
def plan(tmp_path: Path) -> CheckpointPlan:
    """In a folder of the test."""
    made = plan_checkpoint(settings_of(environment(tmp_path)))
    assert made is not None
    return made


@pytest.fixture
def engine() -> DumpableEngine:
    """An engine that works."""
    return DumpableEngine()


class Life:
    """A lifecycle whose agent acts at the looks that the test names."""

    def __init__(self, plan: CheckpointPlan, engine: DumpableEngine, level: int, agent: dict[int, Callable[[], object]]) -> None:
        self.host = QuickHost()
        self.looks = 0
        self._agent = agent
        cycle = SleepCycle(self.host, engine, engine.verify, Abilities(), "w")
        self.lifecycle = Lifecycle(plan, cycle, engine, level, self._pause)

    async def _pause(self, seconds: float) -> None:
        assert seconds == 1.0
        assert self.host.state is WorkerState.ASLEEP
        self.looks += 1
        self._agent.get(self.looks, lambda: None)()


@pytest.mark.parametrize(("level", "around"), [
    (0, ["pause", "resume", "verify"]),
    (1, ["pause", "sleep1", "prepare", "restore", "wake ['weights']", "wake ['kv_cache']", "resume", "verify"]),
    (2, ["pause", "sleep2", "prepare", "restore", "wake ['weights']", "reload_weights", "wake ['kv_cache']", "resume", "verify"]),
])
async def test_a_restored_worker_wakes_and_serves(plan: CheckpointPlan, engine: DumpableEngine, level: int, around: list[str]) -> None:
    """The ready file is there before the first look; the marker may come any time later."""
    def restore() -> None:
        assert plan.ready_file.read_text() == "ready"
        plan.restore_marker.touch()

    life = Life(plan, engine, level, {3: restore})
    assert await life.lifecycle.run() is Outcome.RESTORED
    assert (life.looks, life.host.state, engine.calls) == (3, WorkerState.READY, around)


async def test_a_dumped_worker_has_done_its_work(plan: CheckpointPlan, engine: DumpableEngine) -> None:
    """It does not wake; half of an answer is none."""
    agent = {1: lambda: plan.signal_file.write_text('{"succ'), 2: lambda: plan.signal_file.write_text(SUCCESS)}
    life = Life(plan, engine, 1, agent)
    assert not plan.taken
    assert await life.lifecycle.run() is Outcome.TAKEN
    assert (life.looks, life.host.state, plan.taken) == (2, WorkerState.ASLEEP, True)


async def test_a_marker_counts_more_than_a_signal(plan: CheckpointPlan, engine: DumpableEngine) -> None:
    """The image of a restored process may lie beside the signal of its own dump."""
    agent = {1: lambda: (plan.signal_file.write_text(SUCCESS), plan.restore_marker.touch())}
    assert await Life(plan, engine, 1, agent).lifecycle.run() is Outcome.RESTORED


async def test_a_dump_that_fails_ends_the_worker_with_its_reason(plan: CheckpointPlan, engine: DumpableEngine) -> None:
    """The agent's own words."""
    with pytest.raises(EngineError, match="the checkpoint failed: criu: no space left"):
        await Life(plan, engine, 1, {1: lambda: plan.signal_file.write_text(FAILURE)}).lifecycle.run()


async def test_an_agent_that_never_comes(plan: CheckpointPlan, engine: DumpableEngine) -> None:
    """The wait is bounded, in looks."""
    life = Life(plan, engine, 1, {})
    with pytest.raises(UnavailableError, match=r"within 5 s \(TANDEM_CHECKPOINT_TIMEOUT_S\)"):
        await life.lifecycle.run()
    assert life.looks == 5


async def test_an_engine_that_can_not_sleep_is_not_reported_ready(plan: CheckpointPlan, engine: DumpableEngine) -> None:
    """No agent may dump it."""
    engine.broken = {"sleep1"}
    with pytest.raises(EngineError, match="did not fall asleep"):
        await Life(plan, engine, 1, {}).lifecycle.run()
    assert not plan.ready_file.exists()


@pytest.mark.parametrize("name", ["signal_file", "restore_marker"])
def test_answers_of_an_earlier_run_are_refused(plan: CheckpointPlan, name: str) -> None:
    """They would end the wait before it began; a ready file is simply removed."""
    plan.ready_file.write_text("ready")
    stale: Path = getattr(plan, name)
    stale.write_text(SUCCESS)
    with pytest.raises(ConfigError, match="an earlier run left it, remove it"):
        plan.clear()
    stale.unlink()
    plan.clear()
    assert not plan.ready_file.exists()


async def test_a_ready_file_that_can_not_be_written(plan: CheckpointPlan, engine: DumpableEngine) -> None:
    """The sentence names the variable."""
    unwritable = replace(plan, ready_file=Path("/proc/none/ready"))
    with pytest.raises(ConfigError, match="set DYN_READY_FOR_CHECKPOINT_FILE"):
        await Life(unwritable, engine, 0, {}).lifecycle.run()


@pytest.mark.parametrize(("content", "exists"), [
    (SUCCESS, True), (FAILURE, False), ("", False), ("[]", False), ('{"success": "yes"}', False), (None, False),
])
def test_an_existing_checkpoint_is_one_that_says_so(plan: CheckpointPlan, content: str | None, exists: bool) -> None:
    """Everything else is made anew."""
    plan.location.mkdir()
    if content is not None:
        (plan.location / "checkpoint.done").write_text(content)
    assert plan.exists is exists


def test_without_a_signal_file_nothing_is_asked_for(tmp_path: Path) -> None:
    """The other variables alone mean nothing."""
    variables = environment(tmp_path)
    del variables["DYN_CHECKPOINT_SIGNAL_FILE"]
    assert plan_checkpoint(settings_of(variables)) is None


@pytest.mark.parametrize("name", ["DYN_READY_FOR_CHECKPOINT_FILE", "DYN_CHECKPOINT_STORAGE_TYPE", "DYN_CHECKPOINT_LOCATION",
                                  "DYN_RESTORE_MARKER_FILE"])
def test_every_variable_is_needed(tmp_path: Path, name: str) -> None:
    """The sentence names the missing one."""
    variables = environment(tmp_path)
    del variables[name]
    with pytest.raises(ConfigError, match=f"also needs {name}"):
        plan_checkpoint(settings_of(variables))


@pytest.mark.parametrize(("changes", "message"), [
    ({"DYN_CHECKPOINT_STORAGE_TYPE": "s3"}, "use pvc"), ({"DYN_RESTORE_MARKER_FILE": "/no/such/marker"}, "no folder /no/such"),
    ({"DYN_READY_FOR_CHECKPOINT_FILE": "{folder}/signal"}, "three files"), ({"TANDEM_CHECKPOINT_TIMEOUT_S": "0"}, "from 1 to"),
])
def test_contradictions_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    """Before any engine starts."""
    variables = environment(tmp_path) | {name: value.format(folder=tmp_path) for name, value in changes.items()}
    with pytest.raises(ConfigError, match=message):
        plan_checkpoint(settings_of(variables))


@pytest.mark.parametrize("content", [json.dumps({"success": False}), json.dumps({"success": False, "error": "why"})])
def test_a_failure_may_come_without_a_reason(tmp_path: Path, content: str) -> None:
    """It stays one."""
    (tmp_path / "signal").write_text(content)
    verdict = read_verdict(tmp_path / "signal")
    assert verdict is not None
    assert (verdict.success, verdict.error) == (False, json.loads(content).get("error", ""))


@pytest.mark.parametrize(("is_cpu", "asked", "enabled"), [(False, True, True), (False, False, None), (True, True, None)])
def test_a_worker_to_be_dumped_gets_sleep_mode_where_there_is_one(tmp_path: Path, is_cpu: bool, asked: bool, enabled: bool | None) -> None:
    """Nobody has to add the engine argument; a CPU engine would refuse it."""
    settings = settings_of(environment(tmp_path) if asked else {})
    arguments = complete({"model": "m"}, settings, Platform(is_cpu, frozenset({"model"})))
    assert arguments.get("enable_sleep_mode") is enabled


def test_a_checkpoint_is_of_one_worker(tmp_path: Path) -> None:
    """The launcher says so before it starts anything, and sees one that is there or was just taken."""
    wanted, other = settings_of(environment(tmp_path)), settings_of({})
    assert existing_checkpoint([other, other], routers=1) == ""
    for settings, routers in (([wanted, wanted], 0), ([wanted], 1)):
        with pytest.raises(ConfigError, match="one worker alone"):
            existing_checkpoint(settings, routers)
    assert existing_checkpoint([wanted], routers=0) == ""
    assert not checkpoint_was_taken([wanted])
    (tmp_path / "signal").write_text(SUCCESS)
    assert checkpoint_was_taken([wanted])
    (tmp_path / "location").mkdir()
    (tmp_path / "location" / "checkpoint.done").write_text(SUCCESS)
    assert existing_checkpoint([wanted], routers=0) == f"a checkpoint exists in {tmp_path}/location: nothing to do"
