# SPDX-License-Identifier: Apache-2.0
"""The planner as the loop uses it: with its profile, its past out of a trace or a file, and its state as bytes."""

import logging
import time
from pathlib import Path

from tandem_planner.config import PlannerConfig
from tandem_planner.plan import Planner
from tandem_planner.predict.warmup import read_history
from tandem_planner.profile_data import read_profile
from tandem_planner.state import PlannerState
from tandem_planner.terms import Decision, Observation
from tandem_protocol.errors import ConfigError

log = logging.getLogger(__name__)


class PlannerBrain:
    """One planner. `decide` is called by one thread at a time."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    @classmethod
    def of(cls, config: PlannerConfig, saved: bytes | None) -> "PlannerBrain":
        """With what it had learned, if that can be read. Raises ConfigError for a profile, trace or target that can't be."""
        profile = read_profile(Path(config.profile_results_dir)) if config.profile_results_dir else None
        planner = Planner(config, profile, _restored(saved) if saved is not None else None)
        if config.load_predictor_warmup_trace:
            planner.warm_up(read_history(Path(config.load_predictor_warmup_trace), config.adjustment_interval, time.time()))
        return cls(planner)

    def decide(self, observation: Observation) -> Decision:
        """How many workers each pool should have."""
        return self._planner.decide(observation)

    def save(self) -> bytes:
        """What it has learned."""
        return self._planner.state.encode()


def _restored(saved: bytes) -> PlannerState | None:
    try:
        return PlannerState.decode(saved)
    except ConfigError as exc:
        log.warning("planner.state_left_out: %s", exc)
        return None
