# SPDX-License-Identifier: Apache-2.0
"""What is in flight: never negative, never miscounted, empty in the end."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from router_fleet import prompt
from tandem_router.book_events import Add, BookEvent, Free, Output, PrefillDone, decode_event, encode_event
from tandem_router.books import Books, PlacedPrompt
from tandem_router.chains import ChainForest
from tandem_router.cost import Loads

TOKENS = st.integers(0, 5)
STEPS = st.lists(st.tuples(st.sampled_from(["add", "done", "output", "free", "worker", "replica"]), st.integers(0, 7), TOKENS, TOKENS),
                 max_size=60)


def placed(system: int = 2, own: int = 3, seed: int = 0, rest: int = 5, expected: int = 0) -> PlacedPrompt:
    """A prompt of system + own full blocks and `rest` tokens, all of it to be computed."""
    isl = (system + own) * 16 + rest
    return PlacedPrompt(prompt(system, own, seed), isl, 16, isl, expected)


def loads_of(books: Books, *workers: str) -> Loads:
    """The loads of these workers' rank 0."""
    return books.loads(np.array([books.register(worker, 0) for worker in workers]))


def figures(books: Books, worker: str = "a") -> tuple[int, int, float]:
    """Requests, prefill tokens and blocks of one worker."""
    loads = loads_of(books, worker)
    return int(loads.requests[0]), int(loads.prefill_tokens[0]), float(loads.blocks[0])


def test_a_request_counts_from_its_decision_until_freed() -> None:
    """Prefill tokens go at the first token, blocks and the request at the end; ends may repeat."""
    books = Books(pool="decode")
    books.add(1, "a", 0, placed())
    assert figures(books) == (1, 85, 6)
    assert books.prefill_done(1)
    assert not books.prefill_done(1)
    assert figures(books) == (1, 0, 6)
    assert books.free(1)
    assert not books.free(1)
    assert figures(books) == (0, 0, 0)


def test_a_shared_prefix_counts_once() -> None:
    """Two system prompts are one; partly filled last blocks are never shared."""
    books = Books(pool="decode")
    books.add(1, "a", 0, placed(seed=1))
    books.add(2, "a", 0, placed(seed=2))
    assert figures(books)[2] == 2 + 2 * (3 + 1)
    column = np.array([books.register("a", 0)])
    assert books.shared(prompt(2, 9, 3), column).tolist() == [2]
    books.free(1)
    assert figures(books)[2] == 6


def test_without_reuse_everything_counts() -> None:
    """A worker without prefix caching stores a shared prefix twice."""
    books = Books(pool="decode", assume_kv_reuse=False)
    books.add(1, "a", 0, placed())
    books.add(2, "a", 0, placed())
    assert figures(books)[2] == 12
    assert books.shared(prompt(2, 3, 0), np.array([0])).tolist() == [0]
    books.check_integrity()


def test_output_grows_by_blocks() -> None:
    """The last prompt block has room for 11 tokens; a block is added by the twelfth."""
    books = Books(pool="decode", track_output=True)
    books.add(1, "a", 0, placed())
    books.output(1, 11)
    assert figures(books)[2] == 6
    books.output(1, 1)
    assert figures(books)[2] == 7
    assert not Books(pool="decode").output(1, 5)


def test_expected_output_fades() -> None:
    """Half way to the expected end output blocks count half; beyond it they count nothing."""
    books = Books(pool="decode", track_output=True)
    books.add(1, "a", 0, placed(rest=0, expected=64))
    books.output(1, 32)
    assert figures(books)[2] == pytest.approx(5 + 2 * 0.5)
    books.output(1, 64)
    assert figures(books)[2] == 5


def test_a_long_generation_never_expires() -> None:
    """Nothing in the books knows the time: an hour of tokens later it still counts."""
    books = Books(pool="decode", track_output=True)
    books.add(1, "a", 0, placed())
    for _ in range(100):
        books.output(1, 1000)
    assert figures(books)[0] == 1


def test_replicas_share_their_books() -> None:
    """What one places the other counts, whatever way the bytes took; own and foreign pools' events are left alone."""
    sent: list[BookEvent] = []
    mine = Books(pool="decode", replica="r1", track_output=True, publish=sent.append)
    other = Books(pool="decode", replica="r2", track_output=True)
    mine.add(1, "a", 0, placed())
    mine.prefill_done(1)
    mine.output(1, 40)
    mine.output(1, 1)
    for event in sent:
        assert other.apply_remote(decode_event(encode_event(event)))
        assert not mine.apply_remote(event)
        assert not Books(pool="prefill", replica="r2").apply_remote(event)
    assert [type(event) for event in sent] == [Add, PrefillDone, Output]
    assert figures(other) == figures(mine) == (1, 0, 8)
    mine.free(1)
    assert other.apply_remote(sent[-1])
    assert figures(other) == (0, 0, 0)


def test_a_late_replica_catches_up() -> None:
    """It is sent the requests as they stand."""
    mine = Books(pool="decode", replica="r1", track_output=True)
    mine.add(1, "a", 0, placed())
    mine.prefill_done(1)
    mine.output(1, 40)
    late = Books(pool="decode", replica="r2", track_output=True)
    for event in mine.own_requests():
        late.apply_remote(event)
    assert figures(late) == figures(mine)


def test_a_dead_replicas_requests_go() -> None:
    """Only its own."""
    books = Books(pool="decode", replica="r1")
    books.add(1, "a", 0, placed(seed=1))
    other: list[BookEvent] = []
    Books(pool="decode", replica="r2", publish=other.append).add(1, "a", 0, placed(seed=2))
    books.apply_remote(other[0])
    assert figures(books)[0] == 2
    assert books.forget_replica("r2") == 1
    assert figures(books) == (1, 85, 6)


def test_lost_and_repeated_events_are_counted() -> None:
    """An end without a beginning, and a beginning twice, change nothing but their counters."""
    books = Books(pool="decode", replica="r1")
    books.apply_remote(Free(replica="r2", pool="decode", ticket=9))
    sent: list[BookEvent] = []
    Books(pool="decode", replica="r2", publish=sent.append).add(1, "a", 0, placed())
    books.apply_remote(sent[0])
    books.apply_remote(sent[0])
    assert (books.misses.unknown, books.misses.duplicate) == (1, 1)
    assert figures(books)[0] == 1


def test_columns_of_gone_workers_are_used_again() -> None:
    """A fleet that restarts for ever needs no more room, not even if a replica still speaks of the dead."""
    books = Books(pool="decode", replica="r1")
    for restart in range(50):
        books.register(f"w{restart}", 0)
        books.add(restart, f"w{restart}", 0, placed(seed=restart))
        books.forget_worker(f"w{restart}")
        sent: list[BookEvent] = []
        Books(pool="decode", replica="r2", publish=sent.append).add(restart, f"w{restart}", 0, placed())
        books.apply_remote(sent[0])
        books.apply_remote(Free(replica="r2", pool="decode", ticket=restart))
        books.check_integrity()
    assert books.register("next", 0) == 0
    assert len(books) == 0


@given(STEPS, st.booleans(), st.booleans())
def test_books_are_never_wrong(steps: list[tuple[str, int, int, int]], reuse: bool, track: bool) -> None:
    """Whatever comes in whatever order, all figures add up after each step, and in the end nothing is left."""
    books = Books(pool="decode", replica="me", assume_kv_reuse=reuse, track_output=track)
    for action, ticket, one, two in steps:
        match action:
            case "add":
                books.apply_remote(Add(replica=f"r{ticket % 2}", pool="decode", ticket=ticket, worker=f"w{one % 3}", dp_rank=two % 2,
                                       keys=prompt(one, two, ticket % 3).astype("<u8").tobytes(), isl=(one + two) * 16 + ticket,
                                       block_size=16, prefill_tokens=ticket * 7, expected_output_tokens=one * 20))
            case "done":
                books.apply_remote(PrefillDone(replica=f"r{ticket % 2}", pool="decode", ticket=ticket))
            case "output":
                books.apply_remote(Output(replica=f"r{ticket % 2}", pool="decode", ticket=ticket, produced=one * 16 + two))
            case "free":
                books.apply_remote(Free(replica=f"r{ticket % 2}", pool="decode", ticket=ticket))
            case "worker":
                books.forget_worker(f"w{one % 3}")
            case _:
                books.forget_replica(f"r{one % 2}")
        books.check_integrity()
        assert_not_negative(books)
    books.forget_replica("r0")
    books.forget_replica("r1")
    assert len(books) == 0
    assert loads_of(books, "w0", "w1", "w2").blocks.tolist() == [0, 0, 0]
    books.check_integrity()


def assert_not_negative(books: Books) -> None:
    """No figure of any known worker is below zero."""
    columns = [column for name in ("w0", "w1", "w2") for column in books.columns_of(name)]
    loads = books.loads(np.array(columns, np.int64))
    assert (loads.requests >= 0).all()
    assert (loads.prefill_tokens >= 0).all()
    assert (loads.blocks >= 0).all()


def test_integrity_is_really_checked() -> None:
    """A figure that is off is found, and so is a lost holder."""
    books = Books(pool="decode")
    books.add(1, "a", 0, placed())
    books._requests[0] += 1
    with pytest.raises(AssertionError, match="column 0"):
        books.check_integrity()
    chains = ChainForest()
    run = chains.add(0, prompt(0, 2, 1))
    with pytest.raises(AssertionError, match="other chains"):
        chains.check_integrity([(0, run), (0, run)])
    chains._blocks[0] += 1
    with pytest.raises(AssertionError, match="miscounted"):
        chains.check_integrity([(0, run)])


@given(st.lists(st.tuples(TOKENS, TOKENS, st.integers(0, 3), st.integers(0, 2)), max_size=12))
def test_chains_agree_with_plain_sets(shapes: list[tuple[int, int, int, int]]) -> None:
    """Sizes and depths are those of sets of all prefixes, per column, while chains are added and while they are released."""
    chains = ChainForest()
    held = [(column, keys) for column, keys in ((shape[3], prompt(*shape[:3])) for shape in shapes) if len(keys)]
    runs = []
    for at, (column, keys) in enumerate(held):
        runs.append((column, chains.add(column, keys)))
        assert_like_sets(chains, held[: at + 1])
        chains.check_integrity(runs)
    for at, (column, run) in enumerate(runs):
        chains.release(column, run)
        assert_like_sets(chains, held[at + 1 :])
        chains.check_integrity(runs[at + 1 :])


def assert_like_sets(chains: ChainForest, held: list[tuple[int, NDArray[np.uint64]]]) -> None:
    """Three columns hold these chains, and a fourth nothing."""
    sets = [{key for owner, keys in held if owner == column for key in keys.tolist()} for column in range(4)]
    assert [chains.blocks(column) for column in range(4)] == [len(one) for one in sets]
    for probe in (prompt(3, 2, 1), prompt(5, 5, 2), prompt(0, 1, 9), *(np.append(keys, np.uint64(1)) for _, keys in held)):
        assert chains.depths(probe, np.arange(4)).tolist() == [sum(key in one for key in probe.tolist()) for one in sets]
