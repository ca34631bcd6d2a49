# SPDX-License-Identifier: Apache-2.0
"""What the planner's benchmark runs: loads, targets, the fleet and the planner's settings. All times in seconds."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import traces
from tandem_planner.capacity import Capacity, Demand
from tandem_planner.config import PlannerConfig, PredictorName
from tandem_planner.profile_data import Profile
from tandem_planner.simulate.fleet import FleetSettings
from tandem_planner.simulate.load import Lengths, Load, arrivals, parse_shape
from tandem_planner.simulate.results import Targets
from tandem_planner.simulate.traces import from_lines
from tandem_planner.sla_plan import SlaModel
from tandem_planner.sla_plan import Targets as SlaTargets
from tandem_planner.terms import Mode
from tandem_protocol.roles import Role

START_S = 30.0
"""Of a worker: made up; weights from the page cache and compiled kernels kept."""
MAX_GPUS = 16
SETTLED_S = 300.0
"""Changes before this time are the fleet finding its size."""
FIRST_S = 30.0
_TRACE_REQUESTS, _TRACE_RATE = 4000, 2.5


@dataclass(frozen=True)
class Scenario:
    """One load and its SLA."""

    name: str
    load: Callable[[Profile, int], Load]
    """From the profile (for the size of a cache) and the seed."""
    targets: Targets
    isl: float = 3000.0
    osl: float = 300.0
    warm: bool = False
    """Whether there is a past to learn from: then Tandem's planner also runs after a warm-up with the same load of another seed."""

    def config(self, interval_s: float) -> PlannerConfig:
        """Tandem's planner for it. Other than by default: intervals as short as loads ask for that triple within minutes, a predictor
        that follows them and knows periods, a shorter look back before a pool shrinks, and no corrections: workers are the profile itself.
        """
        return PlannerConfig(
            adjustment_interval=interval_s, worker_start=START_S, max_gpu_budget=MAX_GPUS, isl=self.isl, osl=self.osl,
            ttft=self.targets.ttft_s * 1e3, itl=self.targets.itl_s * 1e3, kalman_r=1.0, kalman_q_trend=1.0, kalman_min_points=3,
            load_predictor=PredictorName.SEASONAL,
            scale_down_patience=1, scale_down_window=15.0, load_scaling_down_sensitivity=95.0,
            no_correction=True,
        )


def beginning(scenario: Scenario, profile: Profile, load: Load) -> dict[Role, int]:
    """The workers that every planner begins with: as many as the model asks for at the rate of the first half minute."""
    first = max(1, int((load.at_s < FIRST_S).sum())) / FIRST_S
    model = SlaModel(Capacity.of(profile), SlaTargets.of(scenario.config(FIRST_S)), 1, 1)
    return {role: model.need(role, Demand(first, scenario.isl, scenario.osl)).workers for role in Mode.DISAGGREGATED.roles}


def fleet() -> FleetSettings:
    """Disaggregated, one GPU per worker."""
    return FleetSettings(start_s=START_S)


def _made(text: str) -> Callable[[Profile, int], Load]:
    return lambda profile, seed: arrivals(parse_shape(text), Lengths(3000, 300), seed)


def _mooncake(profile: Profile, seed: int) -> Load:
    """Conversations whose prompts grow; one worker's KV is the prefix cache."""
    lines = traces.generate(traces.SHAPES["conversation"], _TRACE_REQUESTS, _TRACE_RATE, seed)
    cache = int(profile.decode.max_kv_tokens) if profile.decode is not None else 0
    return from_lines("mooncake", lines, cache)


TIGHT = Targets(ttft_s=0.3, itl_s=0.010)
SCENARIOS = (
    Scenario("sine", _made("sine:5-45:600:1800"), TIGHT, warm=True),
    Scenario("burst", _made("burst:10-30:600+300:1500"), TIGHT),
    Scenario("step", _made("step:10-30:600:1500"), TIGHT),
    Scenario("constant", _made("constant:20:1500"), TIGHT),
    Scenario("mooncake", _mooncake, Targets(ttft_s=5.0, itl_s=0.015), isl=12_000, osl=340),
)
