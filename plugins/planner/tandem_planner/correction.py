# SPDX-License-Identifier: Apache-2.0
"""How a fleet differs from its profile: observed over modelled latency, per pool.

The reference divides the observed latency by the profile's for an engine without a queue, anew in each interval: a burst then looks
like a slow engine, and its factor is ignored for prefill (min(1, p)) while decode chases noise. Here the model knows of queueing and of
the requests in flight, so that what is left is the engines' own; a factor moves by a part of its logarithm at a time (up faster than
down: a missed target costs more than a GPU), stays between `LOWEST` and `HIGHEST`, and is learnt only from intervals that tell something:
enough requests, a pool that didn't change for half of the interval, and no saturation, where latency says how long the overload lasted and
nothing about engines. What is compared is the statistic that the target is for, so that a tail which the profile can't know (prompts of
many lengths, steps that prefill lengthens) is planned for.

A TTFT below the model's may be due to queues that are shorter than modelled, which makes no engine faster: load is only taken for less
(as the reference does for every p < 1) where the mean TTFT, queueing included, is below the profile's for a prompt alone: prefixes that
are reused without being told, or faster engines. One above it may be due to what comes on top (transfers), which takes nothing from an
engine: only while the target is missed is load taken for more, by as much as explains the TTFT.
"""

import math
from dataclasses import replace

from tandem_planner.capacity import Demand
from tandem_planner.queueing import Queue
from tandem_planner.sla_plan import Corrections, SlaModel
from tandem_planner.terms import Pool, Traffic
from tandem_protocol.roles import Role

LOWEST, HIGHEST = 0.5, 2.0
SHARE_UP, SHARE_DOWN = 0.5, 0.2
"""Of the new logarithm per interval, where latency is higher or lower than learnt."""
LEAST_REQUESTS = 10
BISECTIONS = 20
BUSIEST = 0.85
"""Utilisation above which nothing is learnt."""
LEAST_SETTLED = 0.5
"""Of the interval during which the pool must not have changed."""


def corrected(log_correction: float, ratio: float | None) -> float:
    """The logarithm after one interval; `ratio` is None if the interval tells nothing."""
    if ratio is None or not math.isfinite(ratio) or ratio <= 0:
        return log_correction
    bounded = min(math.log(HIGHEST), max(math.log(LOWEST), math.log(ratio)))
    share = SHARE_UP if bounded > log_correction else SHARE_DOWN
    return (1 - share) * log_correction + share * bounded


def corrections_of(role: Role, log_latency: float, log_service: float) -> Corrections:
    """As factors. An aggregated pool has one factor of latency, for its ITL."""
    latency, service = math.exp(log_latency), math.exp(log_service)
    return Corrections(prefill=latency, service=service) if role is Role.PREFILL else Corrections(decode=latency)


def tells_something(traffic: Traffic, pool: Pool, unchanged_s: float) -> bool:
    """Whether latencies of this interval are the engines' own."""
    return traffic.requests >= LEAST_REQUESTS and pool.ready > 0 and pool.settled and unchanged_s >= LEAST_SETTLED * traffic.interval_s


def prefill_ratio(model: SlaModel, role: Role, seen: Demand, ttft_s: float, pool: Pool) -> float | None:
    """Observed over modelled TTFT."""
    if Queue(seen.requests_per_s, model.service_s(seen, role)).utilisation(pool.ready) > BUSIEST:
        return None
    return ttft_s / model.ttft_s(role, seen, pool.ready, model.targets.quantile)


def service_ratio(model: SlaModel, seen: Demand, mean_ttft_s: float, ttft_s: float, pool: Pool) -> float:
    """What the TTFT says about the time that a prompt takes of an engine, over the profile's."""
    if ttft_s > model.targets.ttft_s or model.corrections.service > 1:
        return _explaining(model, seen, ttft_s, pool.ready)
    return min(1.0, mean_ttft_s / replace(model, corrections=Corrections()).alone_s(seen)) if mean_ttft_s > 0 else 1.0


def _explaining(model: SlaModel, seen: Demand, ttft_s: float, workers: int) -> float:
    """The factor from 1 to `HIGHEST` at which the model has this TTFT."""
    low, high = 1.0, HIGHEST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if replace(model, corrections=Corrections(service=middle)).ttft_s(Role.PREFILL, seen, workers, model.targets.quantile) < ttft_s:
            low = middle
        else:
            high = middle
    return low


def decode_ratio(model: SlaModel, role: Role, seen: Demand, itl_s: float, mean_s: float, pool: Pool) -> float | None:
    """Observed over modelled ITL; the mean says how many requests were in flight."""
    if mean_s <= 0 or seen.osl <= 1:
        return None
    return itl_s / model.itl_s(role, seen, pool.ready, mean_s)
