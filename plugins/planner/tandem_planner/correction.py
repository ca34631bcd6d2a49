# SPDX-License-Identifier: Apache-2.0
"""How a fleet differs from its profile: observed over modelled latency, per pool.

The reference divides the observed latency by the profile's for an engine without a queue, anew in each interval: a burst then looks
like a slow engine, and its factor is ignored for prefill (min(1, p)) while decode chases noise. Here the model knows of queueing and of
the requests in flight, so that what is left is the engines' own; a factor moves by a part of its logarithm at a time (up faster than
down: a missed target costs more than a GPU), stays between `LOWEST` and `HIGHEST`, and is learnt only from intervals that tell something:
enough requests, a pool that didn't change for half of the interval, and no saturation, where latency says how long the overload lasted and
nothing about engines. What is compared is the statistic that the target is for, so that a tail which the profile can't know (prompts of
many lengths, steps that prefill lengthens) is planned for.
"""

import math

from tandem_planner.capacity import Demand
from tandem_planner.queueing import Queue
from tandem_planner.sla_plan import Corrections, SlaModel
from tandem_planner.terms import Pool, Traffic
from tandem_protocol.roles import Role

LOWEST, HIGHEST = 0.5, 2.0
SHARE_UP, SHARE_DOWN = 0.5, 0.2
"""Of the new logarithm per interval, where latency is higher or lower than learnt."""
LEAST_REQUESTS = 10
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


def corrections_of(prefill_log: float, decode_log: float) -> Corrections:
    """As factors."""
    return Corrections(math.exp(prefill_log), math.exp(decode_log))


def tells_something(traffic: Traffic, pool: Pool, unchanged_s: float) -> bool:
    """Whether latencies of this interval are the engines' own."""
    return traffic.requests >= LEAST_REQUESTS and pool.ready > 0 and pool.settled and unchanged_s >= LEAST_SETTLED * traffic.interval_s


def prefill_ratio(model: SlaModel, role: Role, seen: Demand, ttft_s: float, pool: Pool) -> float | None:
    """Observed over modelled TTFT."""
    if Queue(seen.requests_per_s, model.service_s(seen, role)).utilisation(pool.ready) > BUSIEST:
        return None
    return ttft_s / model.ttft_s(role, seen, pool.ready, model.targets.quantile)


def decode_ratio(model: SlaModel, role: Role, seen: Demand, itl_s: float, mean_s: float, pool: Pool) -> float | None:
    """Observed over modelled ITL; the mean says how many requests were in flight."""
    if mean_s <= 0 or seen.osl <= 1:
        return None
    return itl_s / model.itl_s(role, seen, pool.ready, mean_s)
