# SPDX-License-Identifier: Apache-2.0
"""One plan from the traffic: learn what the interval tells, foresee the next, and note what each pool needs.

The forecast of requests is not taken on trust: while traffic rises, what was seen is the least; while it falls, half of the fall is
believed, since the interval to come begins where the last one ended.
"""

import math
from dataclasses import replace

from tandem_planner.capacity import Demand
from tandem_planner.config import PlannerConfig
from tandem_planner.correction import corrected, corrections_of, decode_ratio, prefill_ratio, service_ratio, tells_something
from tandem_planner.predict.forecast import Forecaster
from tandem_planner.sla_plan import SlaModel
from tandem_planner.state import PlannerState, RoleState, changed
from tandem_planner.terms import Latency, Observation, Pool, Term, Traffic
from tandem_protocol.roles import Role

LAPSE_INTERVALS = 3
"""Without traffic for so many intervals, the last plan no longer holds; then only load decides."""


def due(config: PlannerConfig, state: PlannerState, observation: Observation) -> bool:
    """Whether there is sound traffic and an interval has passed since it was last planned for."""
    traffic = observation.traffic
    if traffic is None or not config.throughput_scaling or not sound(traffic):
        return False
    since = math.inf if state.planned_at_s is None else observation.at_s - state.planned_at_s
    return since >= 0.95 * config.adjustment_interval or since < 0  # before: the clock was set back


def sound(traffic: Traffic) -> bool:
    """Whether the figures can be of real requests; the vocabulary promises it, and a plan must not rest on a promise."""
    figures = (traffic.interval_s, traffic.requests, traffic.isl, traffic.osl)
    times = (traffic.ttft.mean, traffic.itl.mean, traffic.cached_fraction)
    return all(math.isfinite(one) and one > 0 for one in figures) and all(math.isfinite(one) and one >= 0 for one in times)


def lapsed(config: PlannerConfig, state: PlannerState, at_s: float) -> PlannerState:
    """Forgets a plan that traffic no longer bears out."""
    if state.planned_at_s is None or at_s - state.planned_at_s <= LAPSE_INTERVALS * config.adjustment_interval:
        return state
    roles = {name: changed(role, needed=None, needed_to_shrink=None, plans_below=0) for name, role in state.roles.items()}
    return changed(state, roles=roles, requests_per_s=None)


def planned(config: PlannerConfig, model: SlaModel, forecaster: Forecaster, state: PlannerState,
            observation: Observation) -> tuple[PlannerState, tuple[Term, ...]]:
    """The state after a plan, and its terms. Only if `due`."""
    traffic = observation.traffic
    if traffic is None:
        return state, ()
    seen = demand_of(traffic)
    history = state.history.with_interval(observation.at_s, traffic, config.adjustment_interval)
    foreseen, degraded = forecaster.next(history, seen.cached_fraction)
    rate = believed(foreseen.requests_per_s, seen.requests_per_s, state.requests_per_s)
    demand = Demand(rate, foreseen.isl, foreseen.osl, seen.cached_fraction)
    state = changed(state, history=history, planned_at_s=observation.at_s, requests_per_s=seen.requests_per_s, isl=seen.isl, osl=seen.osl)
    headroom = shrink_margin(config, model.targets.z, traffic.requests)
    terms = _traffic_terms(seen, foreseen, demand, degraded=degraded)
    for role in config.mode.roles:
        if model.plans(role) and (pool := observation.pools.get(role)) is not None:
            role_state = state.of(role)
            if not config.no_correction:
                role_state = _learnt(config, model_for(model, role, role_state), role, role_state, seen, traffic, pool, observation.at_s)
            role_state, more = _needs(config, model_for(model, role, role_state), role, role_state, demand, pool, headroom)
            state, terms = state.with_role(role, role_state), terms + more
    return state, terms


def demand_of(traffic: Traffic) -> Demand:
    """What was asked in the interval."""
    return Demand(traffic.requests / traffic.interval_s, max(1.0, traffic.isl), max(1.0, traffic.osl), min(1.0, traffic.cached_fraction))


def believed(foreseen: float, seen: float, before: float | None) -> float:
    """Requests per second to plan for."""
    falling = before is not None and seen < before
    return max(foreseen, (foreseen + seen) / 2 if falling else seen)


def model_for(model: SlaModel, role: Role, state: RoleState) -> SlaModel:
    """The model with what was learnt of this pool."""
    return replace(model, corrections=corrections_of(role, state.log_correction, state.log_service))


def _learnt(config: PlannerConfig, model: SlaModel, role: Role, state: RoleState, seen: Demand, traffic: Traffic,
            pool: Pool, at_s: float) -> RoleState:
    if not tells_something(traffic, pool, at_s - state.counts_since_s):
        return state
    if role is Role.PREFILL:
        ttft_s = _statistic(config, traffic.ttft)
        state = changed(state, log_service=corrected(state.log_service, service_ratio(model, seen, traffic.ttft.mean, ttft_s, pool)))
        ratio = prefill_ratio(model_for(model, role, state), role, seen, ttft_s, pool)
    else:
        ratio = decode_ratio(model, role, seen, _statistic(config, traffic.itl), traffic.itl.mean, pool)
    return changed(state, log_correction=corrected(state.log_correction, ratio))


def shrink_margin(config: PlannerConfig, z: float, requests: float) -> float:
    """For so much more traffic than is planned for must a smaller pool be enough: the setting, and chance in so many requests, up to it."""
    return math.hypot(config.scale_down_margin, min(config.scale_down_margin, z / math.sqrt(max(requests, 1.0))))


def _needs(config: PlannerConfig, model: SlaModel, role: Role, state: RoleState, demand: Demand,
           pool: Pool, headroom: float) -> tuple[RoleState, tuple[Term, ...]]:
    need, shrunk = model.need(role, demand), model.need(role, demand.times(1 + headroom))
    to_shrink = max(shrunk.workers, need.workers)
    below = state.plans_below + 1 if to_shrink < pool.wanted else 0
    terms = (
        Term("correction", math.exp(state.log_correction), "observed over modelled latency", role),
        Term("service_correction", math.exp(state.log_service), "a prompt's time in an engine over the profile's", role), *need.terms,
        Term("needed", need.workers, "workers that keep the target", role),
        Term("needed_to_shrink", to_shrink, f"the same with {headroom:.0%} more traffic", role),
        Term("plans_below", below, f"plans in a row that ask for fewer than there are; {config.scale_down_patience} are enough", role),
    )
    return changed(state, needed=need.workers, needed_to_shrink=to_shrink, plans_below=below), terms


def _statistic(config: PlannerConfig, latency: Latency) -> float:
    """The figure that the target is for; the mean where a quantile is missing."""
    value = float(getattr(latency, config.sla_statistic.value))
    return value if math.isfinite(value) and value > 0 else latency.mean


def _traffic_terms(seen: Demand, foreseen: Demand, demand: Demand, *, degraded: bool) -> tuple[Term, ...]:
    how = "the predictor gave way to the last value" if degraded else "by the predictor"
    return (
        Term("observed_requests_per_s", seen.requests_per_s, "over the last interval"),
        Term("predicted_requests_per_s", foreseen.requests_per_s, how),
        Term("planned_requests_per_s", demand.requests_per_s, "what is planned for: no less than seen while it rises, half of a fall"),
        Term("predicted_isl", demand.isl, how), Term("predicted_osl", demand.osl, how),
        Term("cached_fraction", demand.cached_fraction, "of prompt tokens that need no prefill"),
        Term("predictor_degraded", float(degraded), "1: some series is not predicted"),
    )
