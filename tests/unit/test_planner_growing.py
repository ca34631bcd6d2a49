# SPDX-License-Identifier: Apache-2.0
"""When a pool grows and what it learns by it: slopes that are believed, queues that are being worked off, lessons and chance."""

from dataclasses import replace

import pytest

from tandem_planner.config import PlannerConfig
from tandem_planner.load_plan import Thresholds, look
from tandem_planner.predict.kalman import KalmanPredictor, borne_out
from tandem_planner.predict.series import Point
from tandem_planner.stability import FIRST_LESSON_S, OUTGROWN_S, after_plan, decided, lesson_floor, seen
from tandem_planner.state import Change, Lesson, RoleState, changed
from tandem_planner.terms import Pool, WorkerLoad
from tandem_planner.throughput import shrink_margin
from tandem_protocol.roles import Role

CONFIG = PlannerConfig(adjustment_interval=15, worker_start=30, load_interval=5)
BOUNDS = Thresholds(queue_tokens=1000, kv_use=0.5, isl=1000, calm=1.0)


def history(*values: float) -> list[Point]:
    return [Point(15.0 * at, value) for at, value in enumerate(values)]


def pool(ready: int, wanted: int, *queues: float) -> Pool:
    return Pool(ready, wanted, tuple(WorkerLoad(str(at), queued_prefill_tokens=tokens) for at, tokens in enumerate(queues)))


def looked(state: RoleState, seen_pool: Pool, at_s: float) -> tuple[RoleState, int | None]:
    state, verdict = look(Role.PREFILL, seen(state, seen_pool, at_s), seen_pool, BOUNDS, CONFIG, at_s)
    return state, verdict.needed


def test_a_jump_is_no_slope_and_a_line_is_one() -> None:
    """The filter alone would go on from a jump to three times as much."""
    filtered = KalmanPredictor(1.0, 1.0, 1.0, 3)
    jumped = history(10, 10, 10, 10, 10, 30)
    assert filtered.ahead(jumped, 15, 3) < 32
    assert filtered.predict(jumped, 15) > 33
    assert filtered.ahead(history(10, 13, 16, 19, 22, 25), 15, 3) == pytest.approx(34, abs=0.5)


def test_a_fall_is_believed_beyond_its_noise_and_a_rise_at_once() -> None:
    noisy = history(20, 19, 21, 18.5, 20.5, 18)
    assert borne_out(-2.0, noisy, 15) > -0.5
    assert borne_out(-3.0, history(40, 37, 34, 31, 28, 25), 15) == -3.0
    assert borne_out(3.0, history(25, 28.5, 31, 34.5, 37, 40), 15) == 3.0
    assert borne_out(3.0, history(40, 37, 34, 31, 28, 25), 15) == 0.0


def test_a_queue_that_will_be_gone_before_a_worker_comes_adds_none() -> None:
    """6000 tokens too many that fall by 3000 in 5 s are gone in 10 s, and a start takes 30; at 300 in 5 s they are not."""
    for left, grows in ((6000.0, False), (8700.0, True)):
        state, needed = looked(RoleState(), pool(2, 2, 4500, 4500), 100)
        assert needed is not None
        state, needed = looked(state, pool(2, 2, left / 2, left / 2), 105)
        assert (needed is not None) is grows


def test_the_look_at_which_a_worker_joined_adds_none() -> None:
    """Panic included: what the newcomer can do is not known yet. The queue that still grows at the next look does."""
    state, _ = looked(RoleState(), pool(2, 3, 9000, 9000), 100)
    state, needed = looked(state, pool(3, 3, 9000, 9000, 0), 105)
    assert needed is None
    _, needed = looked(state, pool(3, 3, 9500, 9500, 1000), 110)
    assert needed is not None


def test_fewer_requests_need_more_headroom_to_shrink_up_to_that_of_the_setting() -> None:
    assert shrink_margin(CONFIG, 0.0, 100) == pytest.approx(0.1)
    assert shrink_margin(CONFIG, 1.645, 10_000) == pytest.approx(0.1013, abs=1e-4)
    assert shrink_margin(CONFIG, 1.645, 1) == pytest.approx(0.1414, abs=1e-4)
    assert shrink_margin(replace(CONFIG, scale_down_margin=0.0), 1.645, 1) == 0.0


def test_what_was_left_of_the_time_before_newcomers_teaches_nothing() -> None:
    grown = decided(RoleState(needed=2, joined_s=80.0), pool(2, 2, 0, 0), 3, 3, CONFIG, 100, 10.0)
    assert grown.outgrown is None
    later = decided(RoleState(needed=2, joined_s=20.0), pool(2, 2, 0, 0), 3, 3, CONFIG, 100, 10.0)
    assert later.outgrown == Change(100, 2, 10.0)


def test_a_load_that_once_outgrew_a_count_teaches_for_a_while_and_growing_again_for_long() -> None:
    once = after_plan(RoleState(outgrown=Change(100, 2, 10.0)), CONFIG, 105, 10.0)
    assert once.lesson == Lesson(2, 10.0, 105 + OUTGROWN_S, 0)
    shrunk = changed(once, last_down=Change(500, 2, 10.0), needed=2)
    again = decided(shrunk, pool(2, 2, 0, 0), 3, 3, CONFIG, 600, 10.0)
    assert again.lesson is not None
    assert again.lesson.until_s >= 600 + FIRST_LESSON_S


def test_a_lesson_holds_while_the_traffic_is_less_by_chance_only() -> None:
    """150 requests in an interval: 13 % fewer are chance, and beyond that a fifth less is a fall."""
    state = RoleState(lesson=Lesson(2, 10.0, 1000.0, 0), needed=2)
    assert lesson_floor(state, CONFIG, 500, 7.5) == 3
    assert lesson_floor(state, CONFIG, 500, 6.5) == 0
    assert lesson_floor(state, CONFIG, 1500, 10.0) == 2
