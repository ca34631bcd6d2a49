# SPDX-License-Identifier: Apache-2.0
"""From queues and KV use to workers, every few seconds: the load plan. It needs no traffic figures, and no profile.

An engine's pressure is its load over the threshold for more workers:
    prefill   prompt tokens queued / what can be computed before a new prompt would miss its TTFT (without a profile: a setting)
    decode    KV use / the use at which the ITL is reached, or requests that wait / `WAITING_REQUESTS`, whichever is more
    agg       the larger of both
    encode    requests at the worker, as routers or its engine count them / a setting; most of their time is spent before the engine
Up if any engine is above 1 at two looks in a row, or above `PANIC` at one: by a quarter for each unit of pressure, the mean over all
engines, by one worker at least and to twice as many at most. A queue says how much was too much for a while, not what is needed for ever;
and if it goes on, so does the growth. Nothing is added while a queue falls so fast that it will be gone before a worker could come. The
count rests on ready workers, so that looks during a start don't add up. Down only if every worker was read at every look of a window, and
the highest pressure of it, spread over the survivors (x N / (N - 1)), stays below a share of the threshold.
"""

import math
from dataclasses import dataclass

from tandem_planner.capacity import Demand
from tandem_planner.config import PlannerConfig
from tandem_planner.sla_plan import SlaModel
from tandem_planner.state import RoleState, Sample, changed
from tandem_planner.terms import Pool, Term, WorkerLoad
from tandem_protocol.roles import Role

PANIC = 2.0
"""Pressure at which one look is enough, as in Knative's panic mode."""
GROWTH, MOST_GROWTH = 0.25, 1.0
"""Of the pool, per unit of mean pressure, and at most."""
WAITING_REQUESTS = 4.0
"""Requests that wait at a decode engine: its KV cache or batch is full; fewer come and go within a step."""
MOST_SAMPLES = 512
TICK = 0.9
"""Of the load interval that two looks lie apart at least; clocks jitter."""


@dataclass(frozen=True)
class Thresholds:
    """Per engine."""

    queue_tokens: float
    kv_use: float
    isl: float
    """Prompt tokens of a request whose tokens aren't known."""
    calm: float
    """Pressure that no engine may exceed for the pool to shrink; 1 where a profile makes the check of the survivors enough."""
    requests: float = math.inf
    """At an encode worker."""


@dataclass(frozen=True)
class LoadVerdict:
    """What the load says about one pool."""

    needed: int | None
    """Workers to have at least; None: no more than there are."""
    least: int | None
    """The fewest that the load allows; None: it is not known well or long enough to take any away."""
    terms: tuple[Term, ...] = ()


def thresholds(role: Role, config: PlannerConfig, model: SlaModel, demand: Demand) -> Thresholds:
    """From profile and targets, else from the settings. `demand` gives the lengths."""
    if role is Role.ENCODE:
        most = config.encode_scale_up_requests
        return Thresholds(math.inf, 1.0, demand.computed_isl, min(1.0, config.encode_scale_down_requests / most), most)
    most_kv, tokens = config.decode_scale_up_kv_rate / 100, config.prefill_scale_up_queue_tokens
    planned = model.plans(role) and config.throughput_scaling
    if planned and role is not Role.DECODE:
        tokens = (model.allowed_wait_s(demand) / model.service_s(demand, role) + 1) * demand.computed_isl
    if planned and role is not Role.PREFILL:
        best = model.best(demand)
        most_kv = min(most_kv, best.kv_use) if best.met else most_kv
    static = {Role.PREFILL: config.prefill_scale_down_queue_tokens / tokens, Role.DECODE: config.decode_scale_down_kv_rate / 100 / most_kv}
    calm = 1.0 if planned else min(static.values()) if role is Role.AGGREGATED else static[role]
    return Thresholds(tokens, max(most_kv, 0.01), demand.computed_isl, min(1.0, calm))


def pressure(role: Role, load: WorkerLoad, bounds: Thresholds) -> float:
    """Of one engine; above 1 it has too much."""
    if role is Role.ENCODE:
        return max(load.active_requests, load.queued_requests) / bounds.requests
    tokens = max(load.queued_prefill_tokens, load.queued_requests * bounds.isl)
    prefill = tokens / bounds.queue_tokens
    decode = max(load.kv_use / bounds.kv_use, load.queued_requests / WAITING_REQUESTS)
    return {Role.PREFILL: prefill, Role.DECODE: decode}.get(role, max(prefill, load.kv_use / bounds.kv_use))


def look(role: Role, state: RoleState, pool: Pool, bounds: Thresholds, config: PlannerConfig, at_s: float) -> tuple[RoleState, LoadVerdict]:
    """One look at a pool: what is remembered of it, and the verdict. `state.counts` are already those of `pool`."""
    found = [pressure(role, load, bounds) for load in pool.loads]
    found = [one for one in found if math.isfinite(one) and one >= 0]
    complete = len(found) >= pool.ready > 0
    highest = max(found, default=0.0)
    since = (state.looked_since_s if state.looked_since_s is not None else at_s) if complete else None
    kept = tuple(one for one in state.samples if at_s - one.at_s <= config.scale_down_window and since is not None and one.at_s >= since)
    over = (state.over_since_s if state.over_since_s is not None else at_s) if highest > 1 else None
    samples = (*kept, Sample(at_s, highest))[-MOST_SAMPLES:] if complete else ()
    needed = _needed(found, pool, over, config, at_s) if not _catching_up(state, found, config, at_s) else None
    state = changed(state, samples=samples, looked_since_s=since, over_since_s=over, last_sum=Sample(at_s, sum(found)) if found else None)
    least = _least(state, pool, bounds, config, at_s)
    return state, LoadVerdict(needed, least, _terms(role, found, needed, least))


def _catching_up(state: RoleState, found: list[float], config: PlannerConfig, at_s: float) -> bool:
    """Whether another worker would come too late: one joined just now, or the pressure falls so fast that it is gone before a start."""
    if state.joined_s == at_s:
        return True
    if state.last_sum is None or not found or at_s <= state.last_sum.at_s:
        return False
    fall_per_s = (state.last_sum.pressure - sum(found)) / (at_s - state.last_sum.at_s)
    return fall_per_s > 0 and (sum(found) - len(found)) / fall_per_s <= config.worker_start


def _needed(found: list[float], pool: Pool, over_since_s: float | None, config: PlannerConfig, at_s: float) -> int | None:
    highest = max(found, default=0.0)
    if over_since_s is None or (highest < PANIC and at_s - over_since_s < TICK * config.load_interval):
        return None
    growth = min(MOST_GROWTH, GROWTH * sum(found) / len(found))
    return max(pool.ready + 1, math.ceil(pool.ready * (1 + growth)))


def _least(state: RoleState, pool: Pool, bounds: Thresholds, config: PlannerConfig, at_s: float) -> int | None:
    """Survivors that would carry the highest load of the window; None while the window isn't over."""
    if state.looked_since_s is None or at_s - state.looked_since_s < config.scale_down_window:
        return None
    highest = max(one.pressure for one in state.samples)
    if highest >= bounds.calm:
        return pool.ready
    return math.ceil(pool.ready * highest / (config.load_scaling_down_sensitivity / 100))


def _terms(role: Role, found: list[float], needed: int | None, least: int | None) -> tuple[Term, ...]:
    terms = [Term("load_pressure", max(found), f"the fullest of {len(found)} engines; above 1 there are too few", role)] if found else []
    if needed is not None:
        terms.append(Term("load_needed", needed, "more, in proportion to the pressure of all engines", role))
    if least is not None:
        terms.append(Term("load_least", least, "survivors that would carry the highest load of the window", role))
    return tuple(terms)
