# SPDX-License-Identifier: Apache-2.0
"""From what is needed to what is done: when a pool grows, when it may shrink, and by how much at a time.

A pool grows at once. It shrinks when the traffic, with a margin, has asked for fewer workers in several plans running, *and* the load of a
whole window would fit the survivors, and nothing is under way. A pool that shrank and had to grow again without more traffic has learnt
that the smaller count is too small, as has one whose load outgrew a plan although, as the next plan sees, traffic had not (`Lesson`). That
count is not tried again before the traffic has fallen, by more than chance, or a time has passed that doubles with each lesson; then one
worker fewer is tried, not many. So at constant load a pool can't go to and fro, whatever misled the model. Load that is not due to a lack
of workers (one enormous prompt) must not teach for ever: a lesson reaches `BEYOND_PLAN` workers above the plan at most, that of a load
which once outgrew a count is short, and what is left of the time before newcomers joined teaches nothing.
"""

import math
from dataclasses import dataclass

from tandem_planner.config import PlannerConfig
from tandem_planner.load_plan import LoadVerdict
from tandem_planner.state import Change, Lesson, RoleState, changed
from tandem_planner.terms import Pool
from tandem_protocol.roles import Role

REGRET_INTERVALS = 3
LEAST_REGRET_S = 600.0
"""Growing again within this time (or so many intervals) after shrinking is a lesson, if the traffic isn't `GROWN` times what it was."""
GROWN, FALLEN = 1.15, 0.8
"""Of the traffic of a lesson: above the first it teaches nothing, below the second it doesn't apply; either beyond chance."""
_CHANCE = 1.645
"""Standard deviations of a Poisson number."""
FIRST_LESSON_S, LONGEST_LESSON_S = 7200.0, 86_400.0
OUTGROWN_S = 300.0
"""A lesson of a load that once outgrew a count lasts so long: it may have been a few large prompts. If it was not, the pool will grow again
soon after it has shrunk, and that lesson lasts `FIRST_LESSON_S`."""
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
    if state.counts is not None and pool.ready > state.counts[0]:
        state = changed(state, joined_s=at_s, over_since_s=None)  # what the newcomers can do is not known yet
    return changed(state, counts=counts, counts_since_s=at_s, looked_since_s=None, last_sum=None, samples=())


def wish(role: Role, state: RoleState, pool: Pool, load: LoadVerdict, config: PlannerConfig, at_s: float, rate: float | None) -> Wish:
    """How many workers the pool should have, at most a step away from what was last wanted; floors come before steps."""
    now, floor = pool.wanted, config.floor(role)
    found = _grown(state, load, now) or _shrunk(state, pool, load, config, at_s, rate, floor) or Wish(now, "as it is")
    step = config.max_throughput_scaling_replicas
    bounded = min(now + step, max(now - step, found.workers))
    if bounded != found.workers:
        found = Wish(bounded, f"{found.why}; {step} at a time")
    ceiling = config.ceiling(role)
    if ceiling is not None and found.workers > ceiling:
        return Wish(ceiling, f"{found.why}; {ceiling} are the most")
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
    kept = lesson_floor(state, config, at_s, rate)
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


def lesson_floor(state: RoleState, config: PlannerConfig, at_s: float, rate: float | None) -> int:
    """The count below which the pool was found too small at such traffic; 0: none."""
    lesson = state.lesson
    if lesson is None:
        return 0
    if rate is not None and lesson.requests_per_s is not None and rate < _by_chance(lesson.requests_per_s, config, -1) * FALLEN:
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
    by_load = state.needed is not None and state.needed <= now and pool.settled
    if by_load and state.outgrown is None and not _working_off(state, config, at_s):
        state = changed(state, outgrown=Change(at_s, now, rate))
    down = state.last_down
    if down is None or granted <= down.workers:
        return state
    recent = at_s - down.at_s <= max(LEAST_REGRET_S, REGRET_INTERVALS * config.adjustment_interval)
    return changed(_taught(state, down, config, at_s, rate) if recent else state, last_down=None)


def _working_off(state: RoleState, config: PlannerConfig, at_s: float) -> bool:
    """Whether workers joined so lately that the load may be what was left of the time before: that teaches nothing about this count."""
    return state.joined_s is not None and at_s - state.joined_s <= 2 * max(config.worker_start, config.adjustment_interval)


def after_plan(state: RoleState, config: PlannerConfig, at_s: float, rate: float | None) -> RoleState:
    """What a plan's traffic says about a count that load had outgrown since the last."""
    return state if state.outgrown is None else changed(_taught(state, state.outgrown, config, at_s, rate, OUTGROWN_S), outgrown=None)


def _by_chance(rate: float, config: PlannerConfig, direction: int) -> float:
    """What an interval of the same traffic may show, above (1) or below (-1)."""
    requests = max(1.0, rate * config.adjustment_interval)
    return max(0.0, rate * (1 + direction * _CHANCE / math.sqrt(requests)))


def _taught(state: RoleState, tried: Change, config: PlannerConfig, at_s: float, rate: float | None,
            first_s: float = FIRST_LESSON_S) -> RoleState:
    """A count was too small, unless traffic has grown since it was tried."""
    if rate is not None and tried.requests_per_s is not None and rate > GROWN * _by_chance(tried.requests_per_s, config, 1):
        return state
    old, workers = state.lesson, tried.workers
    if old is not None and at_s < old.until_s and (rate is None or old.requests_per_s is None or old.requests_per_s <= GROWN * rate):
        workers = max(workers, old.workers)  # what was too few at no more traffic still is
    times = old.times + 1 if old is not None and old.workers >= tried.workers else 0
    lasts_s = min(LONGEST_LESSON_S, first_s if times == 0 else FIRST_LESSON_S * 2 ** min(times, 10))
    return changed(state, lesson=Lesson(workers, rate, at_s + lasts_s, times))


def _retried(state: RoleState, workers: int, at_s: float) -> RoleState:
    """Going down to a count that a lesson forbade until now: the next fewer has to wait in its turn."""
    lesson = state.lesson
    if lesson is None or at_s < lesson.until_s or workers > lesson.workers:
        return state
    return changed(state, lesson=Lesson(workers - 1, lesson.requests_per_s, at_s + LEAST_REGRET_S, lesson.times))
