# SPDX-License-Identifier: Apache-2.0
"""Which parallelism is best for which phase, and whether to disaggregate at all, from one profile per choice. Pure.

Each choice's engine is sized by the planner's own model for one and the same large demand; what a GPU of such a pool serves within the
targets is its goodput. The best choice of a phase has the most; if none keeps the target, the one with the lowest latency is taken, as in
the reference. Disaggregated, a request needs 1 / goodput of prefill and 1 / goodput of decode GPUs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from tandem_planner.capacity import Capacity, Demand
from tandem_planner.profile_data import Profile
from tandem_planner.sla_plan import SlaModel, Targets
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

_FLEET = 40.0
"""Prefill engines that the demand keeps busy, so that rounding to whole workers hardly matters."""
_MOST_PARTS = 8
"""Of the ratio: the larger side's workers at most."""


@dataclass(frozen=True)
class Candidate:
    """One parallelism in one role."""

    role: Role
    tp: int
    """GPUs per engine: the tensor-parallel size."""
    requests_per_gpu_s: float
    """Requests per second and GPU of a pool of such engines."""
    latency_s: float
    """Without load: TTFT of a prompt, or ITL at this context; an aggregated engine's ITL is that with its share of prefill."""
    met: bool
    """Whether the targets can be kept."""


@dataclass(frozen=True)
class Recommendation:
    """For one kind of traffic and one pair of targets."""

    disaggregate: bool
    prefill: Candidate
    decode: Candidate
    aggregated: Candidate
    """The best of each role."""
    workers: tuple[int, int]
    """Prefill and decode workers in the smallest whole ratio."""
    candidates: tuple[Candidate, ...]

    @property
    def ratio(self) -> str:
        """`P:D`, in workers."""
        return f"{self.workers[0]}:{self.workers[1]}"

    @property
    def split_per_gpu_s(self) -> float:
        """Requests per second and GPU of the disaggregated fleet."""
        return 1 / (1 / self.prefill.requests_per_gpu_s + 1 / self.decode.requests_per_gpu_s)

    @property
    def reason(self) -> str:
        """One sentence."""
        split = f"{self.split_per_gpu_s:.3g} requests/s and GPU disaggregated (prefill TP {self.prefill.tp}, decode TP {self.decode.tp})"
        whole = f"{self.aggregated.requests_per_gpu_s:.3g} aggregated (TP {self.aggregated.tp})"
        if self.disaggregate:
            return f"disaggregate: {split}, {whole}; transfers aside"
        return f"stay aggregated: {whole}, {split}"


def recommend(profiles: Mapping[int, Profile], targets: Targets, isl: float, osl: float) -> Recommendation:
    """`profiles` by tensor-parallel size, each whole. Raises ConfigError without any."""
    if not profiles:
        raise ConfigError("there is nothing to recommend from: no choice was measured for prefill and for decode")
    demand = _demand(profiles, isl, osl)
    candidates = tuple(_candidate(role, tp, profile, targets, demand) for tp, profile in sorted(profiles.items())
                       for role in (Role.PREFILL, Role.DECODE, Role.AGGREGATED))
    prefill, decode, aggregated = (_best(candidates, role) for role in (Role.PREFILL, Role.DECODE, Role.AGGREGATED))
    workers = Fraction(decode.requests_per_gpu_s * decode.tp / (prefill.requests_per_gpu_s * prefill.tp)).limit_denominator(_MOST_PARTS)
    workers = workers or Fraction(1, _MOST_PARTS)
    found = Recommendation(disaggregate=False, prefill=prefill, decode=decode, aggregated=aggregated,
                           workers=(workers.numerator, workers.denominator), candidates=candidates)
    split_met = prefill.met and decode.met
    better = found.split_per_gpu_s > aggregated.requests_per_gpu_s if split_met is aggregated.met else split_met
    return found if not better else Recommendation(True, prefill, decode, aggregated, found.workers, candidates)


def _demand(profiles: Mapping[int, Profile], isl: float, osl: float) -> Demand:
    """Large for the smallest choice, which has the weakest engines."""
    curve = Capacity.of(profiles[min(profiles)]).prefill
    if curve is None:
        raise ConfigError("a choice was not measured for prefill: measure it whole")
    return Demand(_FLEET * max(profiles) / curve.ttft_s(isl), isl, osl)


def _candidate(role: Role, tp: int, profile: Profile, targets: Targets, demand: Demand) -> Candidate:
    model = SlaModel(Capacity.of(profile), targets, tp, tp)
    workers = model.need(role, demand).workers
    latency: Callable[[], tuple[float, bool]] = {
        Role.PREFILL: lambda: (alone := model.alone_s(demand), alone <= targets.ttft_s),
        Role.DECODE: lambda: (model.least_itl_s(demand), model.best(demand).met),
        Role.AGGREGATED: lambda: (model.least_itl_s(demand), model.best(demand).met and model.alone_s(demand) <= targets.ttft_s),
    }[role]
    latency_s, met = latency()
    return Candidate(role, tp, demand.requests_per_s / (workers * tp), latency_s, met)


def _best(candidates: tuple[Candidate, ...], role: Role) -> Candidate:
    own = [one for one in candidates if one.role is role]
    met = [one for one in own if one.met]
    return max(met, key=lambda one: one.requests_per_gpu_s) if met else min(own, key=lambda one: one.latency_s)
