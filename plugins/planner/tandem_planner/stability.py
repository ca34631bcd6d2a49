# SPDX-License-Identifier: Apache-2.0
"""From what is needed to what is done: when a pool grows, when it may shrink, and by how much at a time.

A pool grows at once. It shrinks when the traffic, with a margin, has asked for fewer workers in several plans running, *and* the load of a
whole window would fit the survivors, and nothing is under way. A pool that shrank and had to grow again without more traffic has learnt
that the smaller count is too small (`Lesson`): it is not tried again before the traffic has fallen, or a time has passed that doubles with
each lesson. So at constant load a pool can't go to and fro, whatever misled the model.
"""

from dataclasses import dataclass

from tandem_planner.config import PlannerConfig
from tandem_planner.load_plan import LoadVerdict
from tandem_planner.state import Down, Lesson, RoleState, changed
from tandem_planner.terms import Pool
from tandem_protocol.roles import Role

REGRET_INTERVALS = 3
LEAST_REGRET_S = 600.0
"""Growing again within this time (or so many intervals) after shrinking is a lesson, if the traffic isn't `GROWN` times what it was."""
GROWN = 1.15
FALLEN = 0.8
"""Of the traffic of a lesson: below, it doesn't apply."""
FIRST_LESSON_S, LONGEST_LESSON_S = 1800.0, 86_400.0
STUCK_INTERVALS = 5
"""A start or a drain that takes longer than so many intervals no longer keeps the pool from shrinking."""


@dataclass(frozen=True)
class Wish:
    """What one pool should have before the budget, and why."""

    workers: int
    why: str


def seen(state: RoleState, pool: Pool, at_s: float) -> RoleState:
    """Remembers the counts; a change begins the windows anew."""
    counts = (pool.ready, pool.wanted)
    if state.counts == counts:
        return state
    return changed(state, counts=counts, counts_since_s=at_s, looked_since_s=None, samples=())


def wish(role: Role, state: RoleState, pool: Pool, load: LoadVerdict, config: PlannerConfig, at_s: float, rate: float | None) -> Wish:
    """How many workers the pool should have, at most a step away from what was last wanted; floors come before steps."""
    now, floor = pool.wanted, config.floor(role)
    found = _grown(state, load, now) or _shrunk(state, pool, load, config, at_s, rate, floor) or Wish(now, "as it is")
    step = config.max_throughput_scaling_replicas
    bounded = min(now + step, max(now - step, found.workers))
    if bounded != found.workers:
        found = Wish(bounded, f"{found.why}; {step} at a time")
    return Wish(floor, "the fewest that are kept") if found.workers < floor else found


def _grown(state: RoleState, load: LoadVerdict, now: int) -> Wish | None:
    if load.needed is not None and load.needed > max(now, state.needed or 0):
        return Wish(load.needed, "engines have more than they can serve in time")
    if state.needed is not None and state.needed > now:
        return Wish(state.needed, "the traffic needs them")
    return None


def _shrunk(state: RoleState, pool: Pool, load: LoadVerdict, config: PlannerConfig, at_s: float, rate: float | None,
            floor: int) -> Wish | None:
    """Fewer workers, or None: every reason against it comes first."""
    now = pool.wanted
    stuck = at_s - state.counts_since_s > STUCK_INTERVALS * config.adjustment_interval
    if (not pool.settled and not stuck) or state.over_since_s is not None or load.needed is not None:
        return None
    if state.needed_to_shrink is not None:
        fewest = _by_traffic(state, pool, load, config)
    else:
        fewest = max(now - 1, load.least) if load.least is not None else now
    kept = lesson_floor(state, at_s, rate)
    target = max(fewest, floor, kept)
    if target >= now:
        return None
    return Wish(target, f"fewer are enough, but {kept - 1} were not" if kept > max(fewest, floor) else "fewer are enough")


def _by_traffic(state: RoleState, pool: Pool, load: LoadVerdict, config: PlannerConfig) -> int:
    """By the throughput plan, and by the load as far as it is looked at and read at all."""
    if state.plans_below < config.scale_down_patience or state.needed_to_shrink is None:
        return pool.wanted
    if not config.load_scaling or not pool.loads:
        return state.needed_to_shrink
    return pool.wanted if load.least is None else max(state.needed_to_shrink, load.least)


def lesson_floor(state: RoleState, at_s: float, rate: float | None) -> int:
    """The count below which the pool was found too small at such traffic; 0: none."""
    lesson = state.lesson
    if lesson is None or at_s >= lesson.until_s:
        return 0
    lower = rate is not None and lesson.requests_per_s is not None and rate < FALLEN * lesson.requests_per_s
    return 0 if lower else lesson.workers + 1


def decided(state: RoleState, pool: Pool, wanted: int, granted: int, config: PlannerConfig, at_s: float, rate: float | None) -> RoleState:
    """Remembers a decision: `wanted` before the budget, `granted` after it. What the budget takes is no lesson."""
    now = pool.wanted
    state = changed(state, target=granted)
    if wanted < now:
        return changed(state, last_down=Down(at_s, granted, rate), plans_below=0)
    down = state.last_down
    if granted > now and down is not None and granted > down.to:
        return changed(_taught(state, down, config, at_s, rate), last_down=None)
    return state


def _taught(state: RoleState, down: Down, config: PlannerConfig, at_s: float, rate: float | None) -> RoleState:
    grown = rate is not None and down.requests_per_s is not None and rate > GROWN * down.requests_per_s
    if grown or at_s - down.at_s > max(LEAST_REGRET_S, REGRET_INTERVALS * config.adjustment_interval):
        return state
    times = state.lesson.times + 1 if state.lesson else 0
    return changed(state, lesson=Lesson(down.to, rate, at_s + min(LONGEST_LESSON_S, FIRST_LESSON_S * 2 ** min(times, 10)), times))
