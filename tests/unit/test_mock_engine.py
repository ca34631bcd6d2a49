# SPDX-License-Identifier: Apache-2.0
"""The simulated engine batches, caches, evicts, preempts and hands over as vLLM's scheduler does."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from tandem_protocol.errors import ConfigError, RequestError
from tandem_protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from tandem_protocol.roles import Role
from tandem_worker.mock.engine import MockEngine
from tandem_worker.mock.sequences import EngineOutput, EngineRequest
from tandem_worker.mock.settings import EngineSettings
from tandem_worker.mock.timing import StepTiming
from tandem_worker.mock.tokens import Tokens

TIMING = StepTiming(step_s=1.0, prefill_token_s=0.1, attention_pair_s=0.0, decode_sequence_s=0.01, context_token_s=0.0)


def make(role: Role = Role.AGGREGATED, blocks: int = 100, seqs: int = 8, batched: int = 64, watermark: float = 0.0) -> "Reader":
    settings = EngineSettings(role=role, block_size=4, total_blocks=blocks, max_num_seqs=seqs, max_num_batched_tokens=batched,
                              max_model_len=4096, watermark=watermark, kv_bytes_per_token=10, transfer_bytes_per_s=100.0,
                              transfer_latency_s=0.5)
    return Reader(MockEngine(settings, TIMING))


def prompt(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, 1000, length, dtype=np.int32)


def request(name: str, tokens: Tokens, max_tokens: int = 4, remote: int = 0) -> EngineRequest:
    return EngineRequest(name, tokens, max_tokens, remote)


class Reader:
    """Drives an engine in virtual time and keeps what a reader of its events would."""

    def __init__(self, engine: MockEngine) -> None:
        self.engine = engine
        self.now = 0.0
        self.outputs: list[tuple[float, EngineOutput]] = []
        self.hashes: Counter[int] = Counter()
        self.removed: list[int] = []

    def step(self) -> bool:
        """One step, checked; False when the engine has nothing to do."""
        result = self.engine.step(self.now)
        self.engine.check_integrity()
        self.read(result.events)
        assert self.hashes == Counter(self.engine.cached_hashes())
        if result.next_time is None:
            return False
        assert result.next_time >= self.now
        self.now = result.next_time
        self.outputs += [(self.now, output) for output in result.outputs]
        return True

    def run(self, limit: int = 10_000) -> "Reader":
        for _ in range(limit):
            if not self.step():
                return self
        raise AssertionError(f"the engine is not idle after {limit} steps")

    def read(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case BlockStored():
                    assert event.parent is None or self.hashes[event.parent] > 0
                    assert len(event.tokens) == 4 * len(event.hashes)
                    self.hashes.update(event.hashes.tolist())
                case BlockRemoved():
                    self.hashes.subtract(event.hashes.tolist())
                    self.hashes += Counter()
                    self.removed += event.hashes.tolist()
                case AllBlocksCleared():
                    self.hashes.clear()

    def tokens(self, name: str) -> list[int]:
        return [output.token_id for _, output in self.outputs if output.request_id == name]

    def cached(self, name: str) -> int:
        return next(output.cached_tokens for _, output in self.outputs if output.request_id == name)


def serve(reader: Reader, *requests: EngineRequest) -> Reader:
    """Runs these to their end; a reader may serve several times."""
    for item in requests:
        reader.engine.submit(item)
    return reader.run()


def test_a_request_takes_one_prefill_step_and_one_step_per_further_token() -> None:
    reader = serve(make(), request("a", prompt(10), max_tokens=3))
    assert [at for at, _ in reader.outputs] == pytest.approx([2.0, 3.01, 4.02])
    assert [output.finished for _, output in reader.outputs] == [False, False, True]
    assert reader.engine.used_blocks == 0


def test_requests_are_batched_and_share_steps() -> None:
    reader = serve(make(), request("a", prompt(10, 1), 3), request("b", prompt(10, 2), 3))
    assert reader.now == pytest.approx(1 + 20 * 0.1 + 2 * (1 + 2 * 0.01))
    assert reader.engine.counts.steps == 3


def test_a_long_prompt_is_computed_in_chunks_of_the_token_budget_while_others_decode() -> None:
    reader = make(batched=16)
    reader.engine.submit(request("short", prompt(4, 1), 8))
    reader.step()
    reader.engine.submit(request("long", prompt(40, 2), 1))
    reader.run()
    first = next(at for at, output in reader.outputs if output.request_id == "long")
    during = [at for at, output in reader.outputs if output.request_id == "short" and at <= first]
    assert len(during) == 4  # its own first token, and one in each of the three chunks of 15, 15 and 10


def test_a_prompt_whose_chunk_is_one_token_gives_no_output_before_its_last() -> None:
    reader = make(batched=5)
    serve(reader, request("decodes", prompt(2, 1), 9), request("chunked", prompt(14, 2), 2))
    assert reader.tokens("chunked") == serve(make(), request("chunked", prompt(14, 2), 2)).tokens("chunked")
    two = make(batched=2)
    assert serve(two, request("a", prompt(3, 1), 9), request("b", prompt(7, 2), 1)).tokens("b") == serve(
        make(), request("b", prompt(7, 2), 1)).tokens("b")


def test_milestones_are_the_first_and_the_last_token() -> None:
    engine = MockEngine(EngineSettings(block_size=4, total_blocks=100), TIMING, milestones_only=True)
    whole = serve(make(), request("a", prompt(10), 9)).tokens("a")
    reader = serve(Reader(engine), request("a", prompt(10), 9))
    assert [(output.index, output.finished) for _, output in reader.outputs] == [(0, False), (8, True)]
    assert reader.tokens("a") == [whole[0], whole[-1]]


def test_no_more_than_max_num_seqs_run_together() -> None:
    reader = make(seqs=2)
    for index in range(5):
        reader.engine.submit(request(str(index), prompt(4, index), 3))
    most = 0
    while reader.step():
        most = max(most, reader.engine.running)
    assert most == 2
    assert Counter(output.request_id for _, output in reader.outputs) == {str(index): 3 for index in range(5)}


def test_a_shared_prefix_is_found_in_full_blocks_but_its_last_token_is_computed() -> None:
    reader = make()
    shared = prompt(16)
    serve(reader, request("first", shared, 1))
    serve(reader, request("same", shared, 1), request("longer", np.concatenate([shared, prompt(6, 9)]), 1))
    assert reader.cached("same") == 12
    assert reader.cached("longer") == 16


def test_generated_tokens_are_reused_by_the_next_turn() -> None:
    reader = make()
    turn = prompt(8)
    answer = serve(reader, request("one", turn, 9)).tokens("one")
    follow = np.concatenate([turn, np.array(answer, dtype=np.int32), prompt(5, 3)])
    assert serve(reader, request("two", follow, 1)).cached("two") == 16  # the last of 17 tokens was never computed


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    reader = make(blocks=12)
    hashes = {seed: list(serve(reader, request(f"store {seed}", prompt(18, seed), 1)).hashes)[-4:] for seed in (1, 2)}
    serve(reader, request("use 1 again", prompt(18, 1), 1))
    serve(reader, request("needs more than is blank", prompt(28, 3), 1))
    assert reader.removed == list(reversed(hashes[2]))[:3]


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    reader = make(blocks=5)
    hashes = list(serve(reader, request("x", prompt(16, 1), 1)).hashes)
    assert serve(reader, request("y", prompt(12, 5), 1)).removed == [hashes[3], hashes[2]]


def test_out_of_blocks_the_youngest_is_preempted_and_completes_all_the_same() -> None:
    tokens = [prompt(8, seed) for seed in range(3)]
    roomy = serve(make(), *(request(str(seed), item, 12) for seed, item in enumerate(tokens)))
    tight = serve(make(blocks=8), *(request(str(seed), item, 12) for seed, item in enumerate(tokens)))
    assert tight.engine.counts.preemptions > 0
    assert roomy.engine.counts.preemptions == 0
    assert tight.now > roomy.now
    for name in "012":
        assert tight.tokens(name) == roomy.tokens(name)


def test_a_request_waits_until_its_whole_prompt_fits_above_the_watermark() -> None:
    reader = make(blocks=20, watermark=0.5)
    reader.engine.submit(request("a", prompt(16, 1), 3))
    reader.engine.submit(request("b", prompt(32, 2), 1))
    reader.step()
    assert (reader.engine.running, reader.engine.waiting) == (1, 1)
    reader.run()
    assert len(reader.tokens("b")) == 1


def test_a_migrated_request_continues_as_the_unbroken_one() -> None:
    start = prompt(13)
    whole = serve(make(), request("r", start, 20)).tokens("r")
    for cut in (1, 7, 19):
        moved = np.concatenate([start, np.array(whole[:cut], dtype=np.int32)])
        assert serve(make(), request("r", moved, 20 - cut)).tokens("r") == whole[cut:]


def test_two_runs_are_equal_to_the_last_event() -> None:
    def run() -> tuple[list[tuple[float, EngineOutput]], list[int]]:
        reader = serve(make(blocks=30), *(request(str(i), prompt(5 + 3 * i, i % 4), 6) for i in range(12)))
        return reader.outputs, reader.removed

    assert run() == run()


def test_random_traffic_with_aborts_keeps_events_and_cache_equal_and_leaks_no_block() -> None:
    rng = np.random.default_rng(7)
    reader = make(blocks=24, seqs=4, batched=32)
    for index in range(300):
        seed = int(rng.integers(0, 6))
        reader.engine.submit(request(str(index), prompt(int(rng.integers(1, 40)), seed), int(rng.integers(1, 12))))
        for _ in range(int(rng.integers(0, 4))):
            reader.step()
        if index % 5 == 0:
            reader.engine.abort(str(int(rng.integers(max(0, index - 4), index + 1))))
            reader.engine.check_integrity()
    reader.run()
    assert reader.engine.used_blocks == 0
    assert reader.engine.counts.preemptions > 0
    assert reader.removed


def test_an_aborted_request_frees_its_blocks_and_says_no_more() -> None:
    reader = make()
    reader.engine.submit(request("a", prompt(20), 50))
    reader.step()
    assert reader.engine.used_blocks > 0
    assert reader.engine.abort("a")
    assert reader.engine.used_blocks == 0
    assert not reader.engine.abort("a")
    assert not reader.step()


def test_prefill_ends_at_the_first_token_and_holds_its_blocks_until_they_are_taken_or_the_lease_ends() -> None:
    reader = make(Role.PREFILL)
    reader.engine.submit(request("taken", prompt(12, 1), 50))
    reader.engine.submit(request("left", prompt(12, 2), 50))
    reader.step()
    assert [output.finished for _, output in reader.outputs] == [True, True]
    assert (reader.engine.running, reader.engine.held_handoffs, reader.engine.used_blocks) == (0, 2, 6)
    assert reader.engine.release_handoff("taken")
    assert not reader.engine.release_handoff("taken")
    reader.run()
    assert (reader.engine.held_handoffs, reader.engine.used_blocks, reader.engine.counts.expired_handoffs) == (0, 0, 1)


def test_decode_waits_for_the_transfer_pulls_only_what_it_lacks_and_then_computes_one_position() -> None:
    reader = make(Role.DECODE)
    start = prompt(20)
    serve(reader, request("far", start, 2, remote=20))
    assert reader.engine.counts.transferred_tokens == 20
    assert reader.outputs[0][0] == pytest.approx(20 * 10 / 100 + 0.5 + 1.01)
    assert reader.engine.counts.computed_tokens == 2
    assert reader.tokens("far") == serve(make(), request("far", start, 2)).tokens("far")
    serve(reader, request("near", start, 1, remote=20))
    assert reader.engine.counts.transferred_tokens == 24  # 16 of 20 tokens were here


def test_transfers_share_the_link() -> None:
    reader = serve(make(Role.DECODE), request("a", prompt(20, 1), 1, remote=20), request("b", prompt(20, 2), 1, remote=20))
    assert reader.outputs[-1][0] >= 2 * 20 * 10 / 100 + 0.5


def test_clearing_is_refused_while_blocks_are_used_and_announced_when_done() -> None:
    reader = make()
    reader.engine.submit(request("a", prompt(8), 2))
    reader.step()
    assert not reader.engine.clear_cache()
    reader.run()
    assert reader.hashes
    assert reader.engine.clear_cache()
    reader.step()
    assert not reader.hashes
    assert serve(reader, request("b", prompt(8), 1)).cached("b") == 0


@pytest.mark.parametrize(("length", "max_tokens", "message"),
                         [(0, 1, "at least one"), (5000, 1, "exceed the model's"), (300, 200, "KV blocks")])
def test_a_request_that_could_never_run_is_refused(length: int, max_tokens: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make().engine.submit(request("a", prompt(length), max_tokens))


def test_an_engine_that_could_never_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        EngineSettings(total_blocks=0)
    with pytest.raises(ConfigError, match="watermark"):
        EngineSettings(watermark=1.0)
