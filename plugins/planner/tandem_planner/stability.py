# SPDX-License-Identifier: Apache-2.0
"""From what is needed to what is done: when a pool grows, when it may shrink, and by how much at a time.

A pool grows at once. It shrinks when the traffic, with a margin, has asked for fewer workers in several plans running, *and* the load of a
whole window would fit the survivors, and nothing is under way. A pool that shrank and had to grow again without more traffic has learnt
that the smaller count is too small, as has one whose load outgrew a plan although, as the next plan sees, traffic had not (`Lesson`). That
count is not tried again before the traffic has fallen, or a time has passed that doubles with each lesson; then one worker fewer is tried,
not many. So at constant load a pool can't go to and fro, whatever misled the model. Load that is not due to a lack of workers (one
enormous prompt) must not teach for ever: a lesson reaches `BEYOND_PLAN` workers above the plan at most.
"""

from dataclasses import dataclass

from tandem_planner.config import PlannerConfig
from tandem_planner.load_plan import LoadVerdict
from tandem_planner.state import Change, Lesson, RoleState, changed
from tandem_planner.terms import Pool
from tandem_protocol.roles import Role

REGRET_INTERVALS = 3
LEAST_REGRET_S = 600.0
"""Growing again within this time (or so many intervals) after shrinking is a lesson, if the traffic isn't `GROWN` times what it was."""
GROWN = 1.15
FALLEN = 0.8
"""Of the traffic of a lesson: below, it doesn't apply."""
FIRST_LESSON_S, LONGEST_LESSON_S = 7200.0, 86_400.0
BEYOND_PLAN = 2
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
    if lesson is None:
        return 0
    if rate is not None and lesson.requests_per_s is not None and rate < FALLEN * lesson.requests_per_s:
        return 0
    kept = lesson.workers + (1 if at_s < lesson.until_s else 0)
    return kept if state.needed is None else min(kept, state.needed + BEYOND_PLAN)


def decided(state: RoleState, pool: Pool, wanted: int, granted: int, config: PlannerConfig, at_s: float, rate: float | None) -> RoleState:
    """Remembers a decision: `wanted` before the budget, `granted` after it. What the budget takes is no lesson."""
    now = pool.wanted
    state = changed(state, target=granted)
    if wanted < now:
        return changed(_retried(state, granted, at_s), last_down=Change(at_s, granted, rate), plans_below=0)
    if granted <= now:
        return state
    if state.needed is not None and state.needed <= now and state.outgrown is None and pool.settled:
        state = changed(state, outgrown=Change(at_s, now, rate))  # load alone made it grow
    down = state.last_down
    if down is None or granted <= down.workers:
        return state
    recent = at_s - down.at_s <= max(LEAST_REGRET_S, REGRET_INTERVALS * config.adjustment_interval)
    return changed(_taught(state, down, at_s, rate) if recent else state, last_down=None)


def after_plan(state: RoleState, at_s: float, rate: float | None) -> RoleState:
    """What a plan's traffic says about a count that load had outgrown since the last."""
    return state if state.outgrown is None else changed(_taught(state, state.outgrown, at_s, rate), outgrown=None)


def _taught(state: RoleState, tried: Change, at_s: float, rate: float | None) -> RoleState:
    """A count was too small, unless traffic has grown since it was tried."""
    if rate is not None and tried.requests_per_s is not None and rate > GROWN * tried.requests_per_s:
        return state
    old, workers = state.lesson, tried.workers
    if old is not None and at_s < old.until_s and (rate is None or old.requests_per_s is None or old.requests_per_s <= GROWN * rate):
        workers = max(workers, old.workers)  # what was too few at no more traffic still is
    times = old.times + 1 if old is not None and old.workers >= tried.workers else 0
    return changed(state, lesson=Lesson(workers, rate, at_s + min(LONGEST_LESSON_S, FIRST_LESSON_S * 2 ** min(times, 10)), times))


def _retried(state: RoleState, workers: int, at_s: float) -> RoleState:
    """Going down to a count that a lesson forbade until now: the next fewer has to wait in its turn."""
    lesson = state.lesson
    if lesson is None or at_s < lesson.until_s or workers > lesson.workers:
        return state
    return changed(state, lesson=Lesson(workers - 1, lesson.requests_per_s, at_s + LEAST_REGRET_S, lesson.times))
