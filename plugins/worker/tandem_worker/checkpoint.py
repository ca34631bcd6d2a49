# SPDX-License-Identifier: Apache-2.0
"""A worker that is made to be dumped: started, put to sleep, held until it is dumped or restored, and only then serving.

The files and variables are Dynamo's (ChReK). The worker says by the ready file that it can be dumped, and looks every second for one of
two answers: the signal file, which the host's agent writes when the dump is done (this process then ends, as it did its work), or the
restore marker, which whoever restored the dump made beforehand (this process is the restored one: it wakes and serves). The dump
itself, CRIU and cuda-checkpoint, is the host's: examples/checkpoint.

Time is counted in looks, not read off a clock: between a dump and its restore days may pass.
"""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from tandem_protocol.errors import ConfigError, EngineError, UnavailableError
from tandem_worker.config import WorkerSettings
from tandem_worker.sleep import SleepCycle
from tandem_worker.sleep_terms import Patience

log = logging.getLogger(__name__)

DONE_FILE = "checkpoint.done"
READY_TEXT = "ready"
POLL_S = 1.0
_PATIENCE = Patience(drain_s=0.0, blocks_s=10.0)
"""Nobody has sent anything yet."""
_STORAGE_TYPES = ("pvc",)


@dataclass(frozen=True)
class CheckpointPlan:
    """Where agent and worker meet; every path as given."""

    ready_file: Path
    signal_file: Path
    restore_marker: Path
    location: Path
    timeout_s: float

    @property
    def exists(self) -> bool:
        """Whether a checkpoint was finished there already, so that there is nothing to do."""
        path = self.location / DONE_FILE
        if not path.exists():
            return False
        verdict = read_verdict(path)
        if verdict is None or not verdict.success:
            log.warning("checkpoint.unusable path=%s: it doesn't say that it succeeded; another one is made", path)
        return verdict is not None and verdict.success

    @property
    def taken(self) -> bool:
        """Whether the agent has said that the dump is done."""
        verdict = read_verdict(self.signal_file)
        return verdict is not None and verdict.success

    def clear(self) -> None:
        """Removes the ready file of an earlier run. Raises ConfigError for answers of one: they would be taken for this run's."""
        for path in (self.signal_file, self.restore_marker):
            if path.exists():
                raise ConfigError(f"{path} is there before the worker is ready to be dumped: an earlier run left it, remove it")
        self.ready_file.unlink(missing_ok=True)


def plan_checkpoint(settings: WorkerSettings) -> CheckpointPlan | None:
    """The plan, or None without DYN_CHECKPOINT_SIGNAL_FILE. Raises ConfigError for a variable or folder that is missing."""
    if not settings.checkpoint_signal_file:
        return None
    given = {
        "DYN_READY_FOR_CHECKPOINT_FILE": settings.ready_for_checkpoint_file,
        "DYN_CHECKPOINT_STORAGE_TYPE": settings.checkpoint_storage_type,
        "DYN_CHECKPOINT_LOCATION": settings.checkpoint_location,
        "DYN_RESTORE_MARKER_FILE": settings.restore_marker_file,
    }
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise ConfigError(f"DYN_CHECKPOINT_SIGNAL_FILE asks for a checkpoint, which also needs {', '.join(missing)}: set them, or unset it")
    if settings.checkpoint_storage_type not in _STORAGE_TYPES:
        raise ConfigError(f"DYN_CHECKPOINT_STORAGE_TYPE={settings.checkpoint_storage_type!r} is not supported: use pvc")
    plan = CheckpointPlan(
        Path(settings.ready_for_checkpoint_file), Path(settings.checkpoint_signal_file), Path(settings.restore_marker_file),
        Path(settings.checkpoint_location), settings.checkpoint_timeout_s,
    )
    _check_folders(plan)
    return plan


def _check_folders(plan: CheckpointPlan) -> None:
    files = (plan.ready_file, plan.signal_file, plan.restore_marker)
    if len(set(files)) != len(files):
        raise ConfigError("ready file, signal file and restore marker of a checkpoint must be three files: give each its own path")
    for path in files:
        if not path.parent.is_dir():
            raise ConfigError(f"{path} can't be used for checkpoints: there is no folder {path.parent}, mount or make it")


@dataclass(frozen=True)
class Verdict:
    """What a file of the agent says."""

    success: bool
    error: str = ""


def read_verdict(path: Path) -> Verdict | None:
    """`{"success": true}` or `{"success": false, "error": "..."}`; None while there is no such file, or half of one."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("success"), bool):
        return None
    return Verdict(said["success"], str(said.get("error", "")))


class Outcome(StrEnum):
    """Why the worker is held no longer."""

    TAKEN = "taken"
    """It was dumped and is needed no more."""
    RESTORED = "restored"


class CheckpointedEngine(Protocol):
    """What is needed of vLLM's AsyncLLM besides sleep."""

    async def checkpoint_prepare(self) -> None:
        """Brings the communicators between ranks into a state that can be dumped."""

    async def checkpoint_restore(self) -> None:
        """Brings them back."""


class Lifecycle:
    """Sleeps, is held, and wakes or ends. Runs on the worker's event loop, before the worker is known to anybody."""

    def __init__(self, plan: CheckpointPlan, cycle: SleepCycle, engine: CheckpointedEngine, level: int,
                 pause: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """`level` is that of the sleep; 0, for engines that can't sleep, leaves all memory to the dump."""
        self._plan, self._cycle, self._engine, self._level, self._pause = plan, cycle, engine, level, pause

    async def run(self) -> Outcome:
        """Raises TandemError if the engine can't be put to sleep or woken, if the agent says that it failed, or says nothing in time."""
        self._plan.clear()
        await self._cycle.sleep(self._level, _PATIENCE)
        if self._level > 0:
            await self._engine.checkpoint_prepare()
        write_ready(self._plan.ready_file)
        log.info("checkpoint.ready level=%d file=%s", self._level, self._plan.ready_file)
        outcome = await self._wait()
        log.info("checkpoint.%s", outcome)
        if outcome is Outcome.RESTORED:
            if self._level > 0:
                await self._engine.checkpoint_restore()
            await self._cycle.wake_up(None)
        return outcome

    async def _wait(self) -> Outcome:
        left_s = self._plan.timeout_s
        while (outcome := self.look()) is None:
            if left_s <= 0:
                raise UnavailableError(f"nobody dumped or restored the worker within {self._plan.timeout_s:g} s "
                                       "(TANDEM_CHECKPOINT_TIMEOUT_S): does the host's checkpoint agent run?")
            await self._pause(POLL_S)
            left_s -= POLL_S
        return outcome

    def look(self) -> Outcome | None:
        """One look at the files; None while there is no answer. Raises EngineError if the dump failed."""
        if self._plan.restore_marker.exists():
            return Outcome.RESTORED
        verdict = read_verdict(self._plan.signal_file)
        if verdict is None:
            return None
        if not verdict.success:
            raise EngineError(f"the checkpoint failed: {verdict.error or 'its agent gave no reason'}")
        return Outcome.TAKEN


def write_ready(path: Path) -> None:
    """By rename: an agent must never see an empty one. Raises ConfigError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_text(READY_TEXT)
        partial.replace(path)
    except OSError as exc:
        raise ConfigError(f"{path} can't be written ({exc.strerror}): set DYN_READY_FOR_CHECKPOINT_FILE to a file that can") from exc
