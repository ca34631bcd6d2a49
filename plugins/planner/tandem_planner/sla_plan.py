# SPDX-License-Identifier: Apache-2.0
"""From traffic to workers that keep the targets: the throughput plan.

    prefill   the fewest engines with  p (S + wait)  <= TTFT,   S = s x tokens to compute / throughput   (`queueing`)
    decode    ceil( requests/s x OSL x (1 + z / sqrt(L)) / throughput at the highest KV use with  d ITL <= target ),  L in flight
    agg       the fewest engines that do both: prefill takes a share f of an engine's time, and ITL stretches by 1 / (1 - f)

p, s and d are the corrections (`correction`). Unlike the reference's, the prefill formula knows that prompts queue, and the decode formula
that the number of requests in flight is random: for a p95 target z is 1.64 standard deviations of a Poisson number.
A target that is out of reach at these lengths buys no GPUs: then engines are only kept from queueing, and the terms say so.
"""

import math
from dataclasses import dataclass, field
from typing import TypeVar

from tandem_planner.capacity import Capacity, Demand
from tandem_planner.config import PlannerConfig
from tandem_planner.interpolation import BestDecode, DecodeSurface, PrefillCurve
from tandem_planner.queueing import HIGHEST_UTILISATION, Queue
from tandem_planner.terms import Term
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

T = TypeVar("T")

MOST_WORKERS = 1024
"""Of one pool: a bound on work per decision, far above any fleet."""
UNREACHABLE_WAIT = 0.25
"""Of the time to compute a prompt: the wait that is allowed where computing it alone takes the whole TTFT."""
UNREACHABLE_ITL = 1.25
"""Times the lightest load's ITL: what is planned for where that is above the target."""
HIGHEST_PREFILL_SHARE = 0.9
"""Of an aggregated engine's time; the rest is for decoding."""
_Z = {0.5: 0.0, 0.95: 1.645, 0.99: 2.326}


@dataclass(frozen=True)
class Targets:
    """What is to be kept, in seconds, and for which part of the requests."""

    ttft_s: float
    itl_s: float
    quantile: float | None = None
    """None: the mean."""
    variability: float = 1.0
    highest_kv_use: float = 0.9

    @classmethod
    def of(cls, config: PlannerConfig) -> "Targets":
        """As configured."""
        highest = config.decode_scale_up_kv_rate / 100
        return cls(config.ttft_s, config.itl_s, config.sla_statistic.quantile, config.queue_variability, highest)

    @property
    def z(self) -> float:
        """Standard deviations above the mean."""
        return 0.0 if self.quantile is None else _Z[self.quantile]


@dataclass(frozen=True)
class Corrections:
    """Observed over modelled latency; 1: the profile is right."""

    prefill: float = 1.0
    decode: float = 1.0
    service: float = 1.0
    """Of the time that a prompt takes of an engine."""


@dataclass(frozen=True)
class Need:
    """Workers that a pool needs, and why."""

    workers: int
    terms: tuple[Term, ...] = field(default=())


@dataclass(frozen=True)
class SlaModel:
    """Latencies and needs by profile, for pools whose engines have so many GPUs."""

    capacity: Capacity
    targets: Targets
    prefill_gpus: int
    decode_gpus: int
    corrections: Corrections = Corrections()

    def plans(self, role: Role) -> bool:
        """Whether the profile has what a plan for this role needs."""
        parts = {Role.PREFILL: (self.capacity.prefill,), Role.DECODE: (self.capacity.decode,)}
        return None not in parts.get(role, (self.capacity.prefill, self.capacity.decode))

    def need(self, role: Role, demand: Demand) -> Need:
        """Workers for a demand. Only where `plans(role)`."""
        if demand.requests_per_s <= 0:
            return Need(0)
        ways = {Role.PREFILL: self._prefill_need, Role.DECODE: self._decode_need, Role.AGGREGATED: self._aggregated_need}
        return ways[role](demand)

    def ttft_s(self, role: Role, demand: Demand, workers: int, quantile: float | None) -> float:
        """As modelled, before correction; infinite for a pool that doesn't keep up."""
        queue = Queue(demand.requests_per_s, self.service_s(demand, role), self.targets.variability)
        return self.alone_s(demand) + queue.wait_s(workers, quantile)

    def itl_s(self, role: Role, demand: Demand, workers: int, itl_seen_s: float) -> float:
        """As modelled, before correction, for the requests in flight that Little's law gives for the ITL seen."""
        in_flight = demand.requests_per_s * demand.osl * itl_seen_s / max(workers, 1)
        itl = self._surface.itl_s(min(1.0, self._surface.kv_use(in_flight, demand.context)), demand.context)
        return itl / (1 - self._prefill_share(demand, workers)) if role is Role.AGGREGATED else itl

    def service_s(self, demand: Demand, role: Role = Role.PREFILL) -> float:
        """Time that one prompt takes of an engine."""
        gpus = self.decode_gpus if role is Role.AGGREGATED else self.prefill_gpus
        rate = self._curve.throughput_per_gpu(demand.computed_isl) * gpus
        return demand.computed_isl / rate * self.corrections.service

    def alone_s(self, demand: Demand) -> float:
        """TTFT of a prompt with nothing before it; slower engines take longer, faster ones are known by what was observed of all of it."""
        return self._curve.ttft_s(demand.computed_isl) * max(1.0, self.corrections.service)

    def best(self, demand: Demand, stretch: float = 1.0) -> BestDecode:
        """The decode engine's working point for the corrected target; `stretch` is what else lengthens a step."""
        target = self.targets.itl_s / self.corrections.decode / stretch
        least = self._surface.least_itl_s(demand.context)
        reach = target if target >= least else least * UNREACHABLE_ITL
        found = self._surface.best_throughput_per_gpu(reach, demand.context, self.targets.highest_kv_use)
        return BestDecode(found.throughput_per_gpu, found.itl_s, found.kv_use, met=target >= least)

    def least_itl_s(self, demand: Demand) -> float:
        """ITL of an engine with next to no load."""
        return self._surface.least_itl_s(demand.context) * self.corrections.decode

    def allowed_wait_s(self, demand: Demand) -> float:
        """What the TTFT leaves for queueing."""
        alone = self.alone_s(demand)
        return max(self.targets.ttft_s / self.corrections.prefill - alone, UNREACHABLE_WAIT * alone)

    @property
    def _curve(self) -> PrefillCurve:
        return _profiled(self.capacity.prefill, "prefill")

    @property
    def _surface(self) -> DecodeSurface:
        return _profiled(self.capacity.decode, "decode")

    def _prefill_share(self, demand: Demand, workers: int) -> float:
        share = demand.requests_per_s * self.service_s(demand, Role.AGGREGATED) / max(workers, 1)
        return min(HIGHEST_PREFILL_SHARE, share)

    def _prefill_need(self, demand: Demand, role: Role = Role.PREFILL) -> Need:
        queue = Queue(demand.requests_per_s, self.service_s(demand, role), self.targets.variability)
        allowed, alone = self.allowed_wait_s(demand), self.alone_s(demand)
        workers = queue.engines_for(allowed, self.targets.quantile, MOST_WORKERS)
        reachable = self.targets.ttft_s / self.corrections.prefill >= alone
        note = "what the target leaves" if reachable else f"{alone * 1e3:.0f} ms alone is beyond the target: only kept from queueing"
        return Need(workers, (
            Term("prefill_service_s", queue.service_s, f"{demand.computed_isl:.0f} tokens to compute, at the profile's throughput", role),
            Term("prefill_offered", queue.offered, "engines always busy: requests/s x service", role),
            Term("prefill_allowed_wait_s", allowed, note, role),
            Term("prefill_wait_s", queue.wait_s(workers, self.targets.quantile), f"modelled with {workers} engines", role),
        ))

    def _decode_need(self, demand: Demand) -> Need:
        best = self.best(demand)
        wanted, in_flight = self._tokens_per_s(demand, best)
        workers = math.ceil(wanted / (best.throughput_per_gpu * self.decode_gpus))
        return Need(min(max(1, workers), MOST_WORKERS), self._decode_terms(Role.DECODE, best, wanted, in_flight))

    def _tokens_per_s(self, demand: Demand, best: BestDecode) -> tuple[float, float]:
        """Generated tokens per second with headroom for chance, and requests in flight."""
        tokens = demand.requests_per_s * demand.osl
        in_flight = tokens * best.itl_s
        return tokens * (1 + self.targets.z / math.sqrt(max(in_flight, 1.0))), in_flight

    def _decode_terms(self, role: Role, best: BestDecode, wanted: float, in_flight: float) -> tuple[Term, ...]:
        note = "the highest whose ITL is within the target" if best.met else "the target is out of reach at this context: near the best ITL"
        return (
            Term("decode_kv_use", best.kv_use, note, role),
            Term("decode_throughput_per_gpu", best.throughput_per_gpu, f"tokens/s at ITL {best.itl_s * 1e3:.1f} ms", role),
            Term("decode_in_flight", in_flight, "requests, by Little's law", role),
            Term("decode_tokens_per_s", wanted, f"requests/s x OSL, with {self.targets.z:g} standard deviations of those in flight", role),
        )

    def _aggregated_need(self, demand: Demand) -> Need:
        prefill = self._prefill_need(demand, Role.AGGREGATED)
        workers = max(prefill.workers, math.ceil(demand.requests_per_s * self.service_s(demand, Role.AGGREGATED) / HIGHEST_PREFILL_SHARE))
        while workers < MOST_WORKERS and not self._decodes_beside(demand, workers):
            workers += 1
        share = self._prefill_share(demand, workers)
        best = self.best(demand, 1 / (1 - share))
        terms = (Term("prefill_share", share, f"of an engine's time, with {workers} engines", Role.AGGREGATED),
                 *self._decode_terms(Role.AGGREGATED, best, *self._tokens_per_s(demand, best)))
        return Need(min(workers, MOST_WORKERS), prefill.terms + terms)

    def _decodes_beside(self, demand: Demand, workers: int) -> bool:
        share = self._prefill_share(demand, workers)
        if share >= HIGHEST_PREFILL_SHARE * HIGHEST_UTILISATION:
            return False
        best = self.best(demand, 1 / (1 - share))
        if not best.met and self.best(demand).met:
            return False  # out of reach only beside so much prefill
        wanted, _ = self._tokens_per_s(demand, best)
        return wanted <= best.throughput_per_gpu * self.decode_gpus * (1 - share) * workers


def _profiled(part: T | None, name: str) -> T:
    if part is None:
        raise ConfigError(f"the profile has no {name} figures: measure them with `tandem profile`, or choose another mode")
    return part
