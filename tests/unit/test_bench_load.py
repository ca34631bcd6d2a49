# SPDX-License-Identifier: Apache-2.0
"""The load generator without its processes: shares, the closed loop, prompts, the options of a run."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from benchmarks.errors import BenchmarkError
from benchmarks.load import Job, closed_loop, split
from benchmarks.options import CPU, GPU, Level, engine_argument, make_levels
from benchmarks.prompts import make_prompts
from benchmarks.sources import completion_tokens
from benchmarks.targets import command_flags


def job(concurrency: int, requests: int) -> Job:
    """A job whose prompts are their numbers."""
    return Job(tuple(f"w{i}" for i in range(concurrency)), tuple(map(str, range(requests))), concurrency, 4, 1.0)


class Server:
    """Answers every prompt in chunks of the given sizes, and counts how many requests are in flight."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.in_flight = 0
        self.most = 0

    async def stream(self, prompt: str, output_tokens: int) -> AsyncIterator[int]:
        """A token stream."""
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        for size in self.sizes:
            await asyncio.sleep(0)
            yield size
        self.in_flight -= 1


@pytest.mark.parametrize(("concurrency", "processes"), [(1, 8), (8, 3), (32, 8), (5, 5)])
def test_shares_add_up(concurrency: int, processes: int) -> None:
    """No prompt is lost or sent twice, and all slots are given out."""
    whole = job(concurrency, 64)
    shares = split(whole, processes)
    assert len(shares) == min(concurrency, processes)
    assert sum(share.concurrency for share in shares) == concurrency
    assert sorted(prompt for share in shares for prompt in share.prompts) == sorted(whole.prompts)
    assert sorted(prompt for share in shares for prompt in share.warmup) == sorted(whole.warmup)


def test_shares_are_balanced_per_slot() -> None:
    """Every slot of every process gets the same number of requests when they divide evenly."""
    assert {len(share.prompts) / share.concurrency for share in split(job(8, 64), 3)} == {8.0}


async def test_the_loop_keeps_exactly_so_many_requests_in_flight() -> None:
    """Closed loop: never more than the concurrency, and that many when there is enough to do."""
    server = Server(1, 2, 1)
    traces = await closed_loop(server.stream, [str(i) for i in range(12)], 4, 4, 5.0)
    assert len(traces) == 12
    assert server.most == 4


async def test_chunks_without_tokens_are_not_chunks() -> None:
    """Triton's final response is empty; it must not count as an arrival."""
    (one,) = await closed_loop(Server(0, 3, 0, 1, 0).stream, ["x"], 1, 4, 5.0)
    assert [chunk.tokens for chunk in one.chunks] == [3, 1]


async def test_a_stream_with_missing_tokens_fails_the_run() -> None:
    """A server that answers less is not faster."""
    with pytest.raises(BenchmarkError, match="3 tokens instead of 4"):
        await closed_loop(Server(1, 2).stream, ["x", "y"], 2, 4, 5.0)


async def test_a_silent_server_fails_the_run_in_time() -> None:
    """Every wait is bounded."""

    async def silent(prompt: str, output_tokens: int) -> AsyncIterator[int]:
        await asyncio.Event().wait()
        yield 1

    with pytest.raises(BenchmarkError, match="0 of 1 requests"):
        await closed_loop(silent, ["x"], 1, 4, 0.01)


def test_prompts_share_no_first_word() -> None:
    """Not within a level, nor between levels, warm-up and other seeds: nothing hits a prefix cache."""
    seeds = [f"{seed}/{level}/{phase}" for seed in (1, 2) for level in (1, 8, 32) for phase in ("warmup", "measured")]
    prompts = [prompt for seed in seeds for prompt in make_prompts(seed, 50, 20)]
    assert len({prompt.split()[0] for prompt in prompts}) == len(prompts)


def test_prompts_are_seeded_and_have_the_asked_length() -> None:
    """Every target gets the same prompts."""
    assert make_prompts("a", 3, 60) == make_prompts("a", 3, 60)
    assert {len(prompt.split()) for prompt in make_prompts("a", 3, 60)} == {60}


def test_requests_per_level_grow_with_the_concurrency() -> None:
    """Every slot runs several requests, and one slot enough of them for a percentile."""
    assert make_levels((1, 32), (), CPU) == (Level(1, 8), Level(32, 64))
    assert make_levels((1, 32), (), GPU) == (Level(1, 32), Level(32, 256))
    assert make_levels((1, 8), (10,), CPU) == (Level(1, 10), Level(8, 10))
    assert make_levels((1, 8), (10, 20), CPU) == (Level(1, 10), Level(8, 20))


@pytest.mark.parametrize(("concurrency", "requests"), [((1, 8), (1, 2, 3)), ((0,), ()), ((1,), (0,)), ((), ())])
def test_contradicting_levels_are_refused(concurrency: tuple[int, ...], requests: tuple[int, ...]) -> None:
    """With a sentence, before any engine starts."""
    with pytest.raises(ValueError, match="requests-per-level"):
        make_levels(concurrency, requests, CPU)


def test_engine_arguments_are_json_or_text() -> None:
    """And reach the command lines in one spelling that vLLM and the launcher share."""
    pairs = ["max-model-len=2048", "enforce_eager=true", "load_format=dummy", "enable_prefix_caching=false", 'c={"a": 1}']
    arguments = dict(map(engine_argument, pairs))
    assert arguments["max_model_len"] == 2048
    assert command_flags(arguments) == [
        "--max-model-len=2048", "--enforce-eager", "--load-format=dummy", "--no-enable-prefix-caching", '--c={"a": 1}'
    ]


def test_the_running_usage_tells_the_tokens_of_an_event() -> None:
    """Lines that carry no usage leave the count as it is."""
    assert completion_tokens(b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n', 3) == 5
    assert completion_tokens(b'data: {"choices": [], "usage": null}\n', 3) == 3
    assert completion_tokens(b"data: [DONE]\n", 3) == 3
    assert completion_tokens(b"\n", 3) == 3


def test_an_error_event_is_an_error() -> None:
    """The server answers 200 first and fails later."""
    with pytest.raises(BenchmarkError, match="engine is dead"):
        completion_tokens(b'data: {"error": {"message": "engine is dead"}}\n', 3)
