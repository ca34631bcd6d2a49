# SPDX-License-Identifier: Apache-2.0
"""What `tandem serve` has to know of checkpoints: that there is nothing to do, or that the work is done."""

from collections.abc import Sequence

from tandem_protocol.errors import ConfigError
from tandem_worker.checkpoint import plan_checkpoint
from tandem_worker.config import WorkerSettings


def existing_checkpoint(settings: Sequence[WorkerSettings], routers: int) -> str:
    """A sentence if the checkpoint is there already, else empty. Raises ConfigError for what can't be dumped together."""
    plans = [plan for plan in map(plan_checkpoint, settings) if plan is not None]
    if not plans:
        return ""
    if len(settings) > 1 or routers:
        raise ConfigError("a checkpoint is of one worker alone: serve it with --mode agg --routers 0, or unset DYN_CHECKPOINT_SIGNAL_FILE")
    return f"a checkpoint exists in {plans[0].location}: nothing to do" if plans[0].exists else ""


def checkpoint_was_taken(settings: Sequence[WorkerSettings]) -> bool:
    """Whether a server that ended while it started had done what it was for."""
    return any(plan is not None and plan.taken for plan in map(plan_checkpoint, settings))
