# SPDX-License-Identifier: Apache-2.0
"""Placement: who takes part, who is chosen, what the next decision knows of it."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from router_fleet import BLOCK, Clock, FakeIndex, placement, prompt, worker, workers
from tandem_protocol.errors import ConfigError, RequestError, UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerState
from tandem_router.book_events import BookEvent
from tandem_router.busy import BusyThresholds
from tandem_router.config import RouterMode, RouterSettings
from tandem_router.placement import UNTRACKED, Placement, RouteRequest


def request(system: int = 0, own: int = 10, seed: int = 0, rest: int = 1, **fields: Any) -> RouteRequest:
    """A prompt of system + own full blocks and `rest` tokens."""
    return RouteRequest(isl=(system + own) * BLOCK + rest, keys=prompt(system, own, seed), **fields)


def chosen(placed: Placement, *requests: RouteRequest) -> list[str]:
    """Where requests go, one after the other, all staying in flight."""
    return [placed.choose(each).worker.id for each in requests]


# who is chosen


def test_the_worker_with_the_prefix_wins() -> None:
    """And the decision says what it has, per tier and in tokens."""
    placed = placement(workers(4), FakeIndex({"w2": (6, 2, 1)}))
    decision = placed.choose(request())
    assert (decision.worker.id, decision.overlap) == ("w2", (6, 2, 1))
    assert (decision.cached_tokens, decision.non_cached_tokens) == (144, 17)


def test_the_last_block_is_computed_even_if_cached() -> None:
    """A prompt of whole blocks that is cached whole still needs its last block, as in vLLM."""
    decision = placement(workers(1), FakeIndex({"w0": (10, 0, 0)})).choose(request(rest=0))
    assert (decision.cached_tokens, decision.non_cached_tokens) == (144, 16)


def test_cold_prompts_spread_evenly() -> None:
    """No hit anywhere: the least loaded, and equals in turn."""
    placed = placement(workers(8))
    assert set(Counter(chosen(placed, *(request(seed=seed) for seed in range(64)))).values()) == {8}


def test_cold_prompts_that_end_at_once_take_turns() -> None:
    """Even if nothing is in flight, no worker gets two in a row."""
    placed = placement(workers(4))
    for seed in range(8):
        decision = placed.choose(request(seed=seed))
        assert decision.worker.id == f"w{seed % 4}"
        placed.free(decision.ticket)


@pytest.mark.parametrize("holders", [["w0"], [f"w{number}" for number in range(8)]])
def test_a_shared_system_prompt_makes_no_herd(holders: list[str]) -> None:
    """64 requests in flight over 8 workers with one system prompt, cached by one or by all: nobody gets more than twice his share."""
    placed = placement(workers(8), FakeIndex(dict.fromkeys(holders, (20, 0, 0))))
    counts = Counter(chosen(placed, *(request(20, 10, seed) for seed in range(64))))
    assert len(counts) == 8
    assert max(counts.values()) <= 16


def test_a_burst_of_equal_prompts_stays_together_before_events_come() -> None:
    """The index knows nothing yet, but the decision does: ten equal prompts, each done before the next, go to one worker."""
    placed = placement(workers(8))
    for _ in range(10):
        decision = placed.choose(request(own=100))
        placed.prefill_done(decision.ticket)
        assert decision.worker.id == "w0"
    assert decision.overlap == (100, 0, 0)


def test_a_burst_spreads_once_the_load_term_says_so() -> None:
    """Equal prompts that pile up unserved cost more than computing the prompt afresh: others take over."""
    placed = placement(workers(4), router_decode_active_request_weight=2.0)
    counts = Counter(chosen(placed, *[request(own=20)] * 80))
    assert len(counts) == 4
    assert max(counts.values()) - min(counts.values()) <= 20


def test_a_burst_of_one_prompt_spreads_though_hits_are_worth_more_than_the_work_they_save() -> None:
    """What a worker was sent but has not reported counts as the work saved at most: a long prompt's burst takes every worker."""
    placed = placement(workers(4), router_kv_overlap_score_credit=5.0)
    assert len(Counter(chosen(placed, *[request(own=2000)] * 8))) == 4


def test_predictions_end_after_their_time() -> None:
    """If no event has come in two seconds, it was no hit."""
    clock = Clock()
    placed = placement(workers(2), clock=clock)
    placed.free(placed.choose(request()).ticket)
    clock.now += 1.9
    assert placed.peek(request()).worker.id == "w0"
    clock.now += 0.1
    assert placed.peek(request()).worker.id == "w1"
    assert placement(workers(2), router_predicted_ttl_secs=0.0).choose(request()).overlap == (0, 0, 0)


def test_without_events_decisions_are_the_index() -> None:
    """For the time to live, and the index is not even asked."""
    clock, index = Clock(), FakeIndex({"w1": (10, 0, 0)})
    placed = placement(workers(2), index, clock, kv_events=False)
    placed.free(placed.choose(request()).ticket)
    clock.now += 119
    assert placed.choose(request()).overlap == (10, 0, 0)
    assert index.matches == 0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(RouterMode.KV, {"w2": 6}), (RouterMode.ROUND_ROBIN, {"w0": 2, "w1": 2, "w2": 2}),
     (RouterMode.LEAST_LOADED, {"w0": 2, "w1": 2, "w2": 2})],
)
def test_modes(mode: RouterMode, expected: dict[str, int]) -> None:
    """Six requests, of which w2 has a long prefix."""
    placed = placement(workers(3), FakeIndex({"w2": (1000, 0, 0)}), router_mode=mode)
    assert Counter(chosen(placed, *(request(1000, 1, seed) for seed in range(6)))) == expected


@pytest.mark.parametrize("mode", [RouterMode.RANDOM, RouterMode.POWER_OF_TWO])
def test_modes_by_chance_use_all(mode: RouterMode) -> None:
    """In the long run everybody gets his share."""
    counts = Counter(chosen(placement(workers(4), router_mode=mode), *(request(seed=seed) for seed in range(200))))
    assert all(30 <= counts[f"w{number}"] <= 70 for number in range(4))


def test_direct_takes_the_named_worker_only() -> None:
    """Without a name it refuses, even if there is just one worker to guess."""
    placed = placement(workers(2), router_mode=RouterMode.DIRECT)
    assert placed.choose(request(worker_id="w1")).worker.id == "w1"
    ranks = placement([worker("w0", ranks=2)], router_mode=RouterMode.DIRECT)
    assert [ranks.choose(request(worker_id="w0", seed=seed)).dp_rank for seed in range(2)] == [0, 1]
    for count in (1, 2):
        with pytest.raises(RequestError, match="worker_id"):
            placement(workers(count), router_mode=RouterMode.DIRECT).choose(request())


def test_requests_override_weight_and_temperature() -> None:
    """Weight 0 ignores the prefix; a high temperature draws among all."""
    index = FakeIndex({"w1": (10, 0, 0)})
    assert placement(workers(2), index).choose(request(overlap_weight=0.0)).worker.id == "w0"
    placed = placement(workers(4), index)
    assert len(set(chosen(placed, *(request(seed=seed, temperature=100.0) for seed in range(40))))) == 4


def test_prompts_without_keys_are_placed_by_load() -> None:
    """Prefixes are not asked for, but the prompt's blocks count."""
    index = FakeIndex()
    placed = placement(workers(3), index)
    assert chosen(placed, *[RouteRequest(isl=100)] * 6) == ["w0", "w1", "w2"] * 2
    assert index.matches == 0
    assert [load.active_blocks for load in placed.loads()] == [14, 14, 14]


# who takes part


def test_a_pinned_worker_takes_it_though_busy() -> None:
    """Who names a worker has chosen; unknown names are answered by the known ones."""
    placed = placement(workers(2), active_prefill_tokens_threshold=0)
    assert chosen(placed, *[request(worker_id="w1")] * 3) == ["w1"] * 3
    with pytest.raises(RequestError, match="known are w0, w1"):
        placed.choose(request(worker_id="w9"))
    placed.mark_down("w1", 5)
    with pytest.raises(UnavailableError, match="'w1' is down"):
        placed.choose(request(worker_id="w1"))


def test_excluded_workers_are_passed_over() -> None:
    """Until none is left."""
    placed = placement(workers(2))
    assert chosen(placed, *[request(exclude=frozenset({"w0"}))] * 2) == ["w1"] * 2
    with pytest.raises(UnavailableError, match="excluded are w0, w1"):
        placed.choose(request(exclude=frozenset({"w0", "w1", "gone"})))


def test_adapters_go_where_they_are_loaded() -> None:
    """Unknown ones are refused, naming the known ones; a name that is pinned to a worker without it too."""
    placed = placement([worker("w0"), worker("w1", loras=("sql", "chat")), worker("w2", loras=("sql",))])
    assert set(chosen(placed, *(request(seed=seed, lora="sql") for seed in range(4)))) == {"w1", "w2"}
    assert chosen(placed, request(lora="chat")) == ["w1"]
    with pytest.raises(RequestError, match="Known: chat, sql"):
        placed.choose(request(lora="poetry"))
    with pytest.raises(RequestError, match="'w2' does not have"):
        placed.choose(request(lora="chat", worker_id="w2"))
    with pytest.raises(UnavailableError, match="excluded are w1"):
        placed.choose(request(lora="chat", exclude=frozenset({"w1"})))


def test_only_ready_workers_of_the_role_take_part() -> None:
    """The others are named with their state."""
    fleet = [worker("w0", state=WorkerState.DRAINING), worker("w1"), worker("p0", role=Role.PREFILL)]
    placed = placement(fleet)
    assert chosen(placed, *[request()] * 2) == ["w1"] * 2
    placed.set_workers(fleet[:1])
    with pytest.raises(UnavailableError, match="w0 is draining"):
        placed.choose(request())
    placed.set_workers(fleet[2:])
    with pytest.raises(UnavailableError, match="no aggregated worker is registered"):
        placed.choose(request())


def test_an_adapter_that_no_prefill_worker_has_is_prefilled_by_decode() -> None:
    """Prefill is given up, not the request."""
    placed = placement([worker("p0", role=Role.PREFILL)])
    with pytest.raises(UnavailableError, match="LoRA adapter 'sql' is on no worker"):
        placed.choose(request(lora="sql"))


def test_another_block_size_is_refused_with_the_fix() -> None:
    """Its keys would never match, which looks like a cold cache for ever."""
    placed = placement([worker("w0")])
    refused = placed.set_workers([worker("w0"), worker("w1", block_size=32)])
    assert [refusal.worker_id for refusal in refused] == ["w1"]
    assert "--block-size 16" in refused[0].reason
    assert [record.id for record in placed.workers] == ["w0"]
    with pytest.raises(UnavailableError, match="its block size is 32"):
        placement([worker("w1", block_size=32)], kv_cache_block_size=16).choose(request())


def test_a_gone_worker_leaves_with_its_books() -> None:
    """Its requests are forgotten, so that ending them late does no harm; the rest goes on."""
    placed = placement(workers(2))
    tickets = {decision.worker.id: decision.ticket for decision in (placed.choose(request(seed=seed)) for seed in range(2))}
    placed.set_workers(workers(1))
    assert [load.worker_id for load in placed.loads()] == ["w0"]
    assert not placed.free(tickets["w1"])
    assert placed.free(tickets["w0"])
    placed.books.check_integrity()
    placed.set_workers(workers(2))
    assert [load.active_requests for load in placed.loads()] == [0, 0]
    assert placed.peek(request(seed=1)).overlap == (0, 0, 0)


def test_a_draining_worker_keeps_its_books() -> None:
    """It still works on what it has."""
    placed = placement(workers(1))
    ticket = placed.choose(request()).ticket
    placed.set_workers([worker("w0", state=WorkerState.DRAINING)])
    placed.set_workers(workers(1))
    assert placed.loads()[0].active_requests == 1
    assert placed.free(ticket)


def test_a_broken_worker_is_left_alone_for_a_while() -> None:
    """At once, until time is over or its record changes, but not because others' do."""
    clock = Clock()
    placed = placement(workers(2), clock=clock)
    placed.mark_down("w0")
    assert chosen(placed, *[request()] * 3) == ["w1"] * 3
    placed.set_workers([*workers(2), worker("w2")])
    assert "w0" not in [record.id for record in placed.workers]
    clock.now += 5
    assert placed.choose(request(seed=5)).worker.id == "w0"
    placed.mark_down("w0", 1e9)
    placed.set_workers([worker("w0", loras=("new",)), worker("w1")])
    assert placed.choose(request(seed=6, exclude=frozenset({"w1"}))).worker.id == "w0"
    placed.mark_down("unknown", 5)


def test_all_down_says_who() -> None:
    """And nothing is chosen in despair."""
    placed = placement(workers(1))
    placed.mark_down("w0", 5)
    with pytest.raises(UnavailableError, match="down are w0"):
        placed.choose(request())


# busy


def test_busy_workers_are_left_out_until_all_are() -> None:
    """Thresholds may change while it runs."""
    placed = placement(workers(2), FakeIndex({"w0": (10, 0, 0)}))
    placed.thresholds = BusyThresholds(active_prefill_tokens=0)
    tickets = [placed.choose(request(own=12)).ticket for _ in range(2)]
    assert [load.busy for load in placed.loads()] == [True, True]
    with pytest.raises(UnavailableError, match=r"all workers are busy: .* active_prefill_tokens > 0"):
        placed.choose(request())
    placed.prefill_done(tickets[1])
    assert placed.choose(request()).worker.id == "w1"
    placed.thresholds = BusyThresholds()
    assert placed.choose(request(own=12, exclude=frozenset({"w1"}))).worker.id == "w0"


def test_a_free_rank_takes_what_its_busy_neighbour_cannot() -> None:
    """Ranks are candidates by themselves, each with its share of the blocks."""
    placed = placement([worker("w0", ranks=2)], active_decode_blocks_threshold=0.2)
    ranks = [placed.choose(request(own=149, seed=seed)).dp_rank for seed in range(2)]
    assert ranks == [0, 1]
    assert {load.total_blocks for load in placed.loads()} == {500}
    with pytest.raises(UnavailableError, match="all workers are busy"):
        placed.choose(request())


# books


def test_peek_changes_nothing_and_explains() -> None:
    """The same decision again and again, each term of each candidate told."""
    placed = placement(workers(3), FakeIndex({"w1": (2, 3, 2)}))
    before = placed.loads()
    decisions = [placed.peek(request()) for _ in range(3)]
    assert {decision.worker.id for decision in decisions} == {"w1"}
    assert placed.loads() == before
    terms = {term.worker_id: term for term in decisions[0].terms}
    assert [terms[name].chosen for name in ("w0", "w1", "w2")] == [False, True, False]
    credit = RouterSettings().router_kv_overlap_score_credit
    assert terms["w1"].adjusted_prefill_blocks == pytest.approx(161 / 16 - credit * 2 - 0.75 * 3 - 0.25 * 2)
    assert (terms["w1"].decode_blocks, terms["w1"].hits) == (11, (2, 3, 2))
    assert placed.choose(request()).terms == ()


def test_untracked_requests_need_no_end() -> None:
    """They are routed like others, but nothing is held for them."""
    placed = placement(workers(2))
    decision = placed.choose(request(track=False))
    assert decision.ticket == UNTRACKED
    assert not placed.free(UNTRACKED)
    assert len(placed.books) == 0


def test_replicas_see_each_others_decisions() -> None:
    """What one places weighs on the other's next decision, until its router is gone."""
    sent: list[BookEvent] = []
    settings = RouterSettings(router_replica_sync=True)
    one = Placement(settings, Role.AGGREGATED, FakeIndex(), Clock(), replica="r1", publish=sent.append)
    other = Placement(settings, Role.AGGREGATED, FakeIndex(), Clock(), replica="r2")
    for placed in (one, other):
        placed.set_workers(workers(2))
    assert one.choose(request()).worker.id == "w0"
    for event in sent:
        other.books.apply_remote(event)
    assert other.peek(request(seed=1)).worker.id == "w1"
    assert other.books.forget_replica("r1") == 1
    assert other.peek(request(seed=1)).worker.id == "w0"
    with pytest.raises(ConfigError, match="DYN_ROUTER_REPLICA_SYNC"):
        Placement(settings, Role.AGGREGATED, FakeIndex())


def test_an_empty_pool_has_no_loads() -> None:
    """And its block size is not known yet, unless it is set."""
    placed = placement([])
    assert (placed.loads(), placed.workers, placed.block_size) == ((), (), 0)
    placed.set_workers([worker("w0", block_size=64)])
    assert placed.block_size == 64


def test_everything_ends_in_an_empty_pool() -> None:
    """A hundred requests of all kinds, ended in another order, leave nothing."""
    placed = placement(workers(5, ranks=2), router_track_output_blocks=True)
    rng = np.random.default_rng(3)
    tickets = []
    for seed in range(100):
        system, own = rng.integers(0, 9, 2).tolist()
        tickets.append(placed.choose(request(system, own, seed % 7, expected_output_tokens=seed)).ticket)
        placed.output_tokens(tickets[-1], seed)
        if seed % 3:
            placed.prefill_done(tickets[-1])
    placed.books.check_integrity()
    placed.beliefs.check_integrity()
    assert all(placed.free(ticket) for ticket in rng.permutation(tickets).tolist())
    assert {(load.active_requests, load.active_prefill_tokens, load.active_blocks) for load in placed.loads()} == {(0, 0, 0.0)}
