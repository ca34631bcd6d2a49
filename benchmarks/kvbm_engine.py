# SPDX-License-Identifier: Apache-2.0
"""One engine of the KVBM benchmark in a process of its own: `python -m benchmarks.kvbm_engine` with a Plan as JSON on standard input.

Its last line of output is the Outcome as JSON. The engine runs in this process's client (AsyncLLM), without Triton: what is compared
is what offloading does to an engine.
"""

import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec

Variant = Literal["none", "kvbm", "native"]
Scenario = Literal["long", "reload", "fits", "exceeds"]
SETTLE_TIMEOUT_S = 60.0
_POLL_S = 0.05


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of `fits` and `exceeds`: conversations that come back `rounds` times, in turn."""

    conversations: int
    tokens: int
    """Prompt length."""
    output_tokens: int
    concurrency: int
    rounds: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What this process does."""

    variant: Variant
    scenarios: tuple[Scenario, ...]
    model: str
    arguments: dict[str, Any]
    """vLLM's engine arguments."""
    host_bytes: int
    """Size of the host tier, for every variant that has one."""
    long_tokens: int
    long_prompts: int
    fits: Load
    exceeds: Load
    vocabulary: int = 49000


class Outcome(msgspec.Struct, kw_only=True):
    """What came of it; times in ms, None where a scenario was not run."""

    start_s: float
    recomputed_ttft_ms: list[float] = []
    loaded_ttft_ms: list[float] = []
    loaded_share: list[float] = []
    """Of each reloaded prompt, the fraction that was not computed."""
    fits_req_per_s: list[float] = []
    exceeds_req_per_s: list[float] = []
    exceeds_ttft_ms: list[float] = []
    counters: dict[str, float] = {}
    """vLLM's and the tiers' counters at the end, by name and labels."""


def main() -> None:
    """Runs the plan."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    outcome = asyncio.run(_run(plan))
    print(msgspec.json.encode(outcome).decode(), flush=True)


async def _run(plan: Plan) -> Outcome:
    begin = time.monotonic()
    async with _engine(plan) as engine:
        outcome = Outcome(start_s=time.monotonic() - begin)
        driver = _Driver(engine, plan)
        await driver.ask(driver.prompt("warm", 64), 4)
        for scenario in plan.scenarios:
            await _SCENARIOS[scenario](driver, outcome)
        outcome.counters = _counters()
    return outcome


@asynccontextmanager
async def _engine(plan: Plan) -> AsyncIterator[Any]:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    transfer = _transfer(plan)
    arguments = {**plan.arguments, **({"kv_transfer_config": KVTransferConfig(**transfer)} if transfer else {})}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=plan.model, **arguments))
    try:
        yield engine
    finally:
        engine.shutdown()


def _transfer(plan: Plan) -> dict[str, Any] | None:
    if plan.variant == "none":
        return None
    if plan.variant == "native":
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
                "kv_connector_extra_config": {"cpu_bytes_to_use": plan.host_bytes, "offload_prompt_only": False}}
    from tandem_protocol.roles import Role
    from tandem_worker.connectors import transfer_config

    return transfer_config(("kvbm",), Role.AGGREGATED)


class _Driver:
    """Prompts and requests of one engine."""

    def __init__(self, engine: Any, plan: Plan) -> None:
        self.engine, self.plan = engine, plan
        self._numbers = itertools.count()

    def prompt(self, name: str, tokens: int) -> list[int]:
        """Random token ids; the same for the same name in every process, and no shared prefix between names."""
        return random.Random(name).choices(range(100, self.plan.vocabulary), k=tokens)

    async def ask(self, prompt: Sequence[int], output_tokens: int) -> tuple[float, int]:
        """(TTFT in ms, prompt tokens that were not computed)."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        begin, first, cached = time.perf_counter(), 0.0, 0
        async for output in self.engine.generate({"prompt_token_ids": list(prompt)}, sampling, f"bench-{next(self._numbers)}"):
            if not first:
                first, cached = time.perf_counter(), output.num_cached_tokens or 0
        return (first - begin) * 1e3, cached

    async def settled(self) -> None:
        """Returns when no block has been stored for half a second: offloading goes on after an answer."""
        await _until_still(lambda: sum(value for name, value in _counters().items() if "store_bytes" in name or "write_bytes" in name),
                           self)

    async def forget_gpu(self) -> None:
        """Empties the engine's prefix cache, and no tier."""
        if not await self.engine.reset_prefix_cache():
            raise RuntimeError("the engine did not reset its prefix cache: requests are in flight")

    async def rounds(self, name: str, load: Load) -> tuple[float, list[float]]:
        """(requests per second, TTFTs in ms) of the load's conversations, each asked once per round, rounds in turn."""
        prompts = [self.prompt(f"{name}-{index}", load.tokens) for index in range(load.conversations)] * load.rounds
        pending, ttfts = iter(prompts), []

        async def slot() -> None:
            for prompt in pending:
                ttfts.append((await self.ask(prompt, load.output_tokens))[0])  # noqa: PERF401 - each counts as soon as it is there

        begin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(load.concurrency):
                group.create_task(slot())
        return len(prompts) / (time.perf_counter() - begin), ttfts


async def _until_still(read: Any, driver: _Driver) -> None:
    deadline, seen, since = time.monotonic() + SETTLE_TIMEOUT_S, -1.0, time.monotonic()
    while time.monotonic() < deadline:
        await driver.ask(driver.prompt("tick", 8), 1)  # statistics come with steps
        value = read()
        if value != seen:
            seen, since = value, time.monotonic()
        elif time.monotonic() - since > 0.5:
            return
        await asyncio.sleep(_POLL_S)
    raise RuntimeError(f"blocks were still being stored after {SETTLE_TIMEOUT_S:g} s")


async def _long(driver: _Driver, outcome: Outcome) -> None:
    """Long prompts computed, then asked again with the GPU's cache emptied; without a tier only the first half."""
    plan = driver.plan
    prompts = [driver.prompt(f"long-{index}", plan.long_tokens) for index in range(plan.long_prompts)]
    for prompt in prompts:
        outcome.recomputed_ttft_ms.append((await driver.ask(prompt, 1))[0])
    if plan.variant != "none":
        await driver.settled()
        await _reload(driver, outcome)


async def _reload(driver: _Driver, outcome: Outcome) -> None:
    """Long prompts that a tier should have: of this process, or of an earlier one on the same disk."""
    plan = driver.plan
    await driver.forget_gpu()
    for index in range(plan.long_prompts):
        ttft, cached = await driver.ask(driver.prompt(f"long-{index}", plan.long_tokens), 1)
        outcome.loaded_ttft_ms.append(ttft)
        outcome.loaded_share.append(cached / plan.long_tokens)


async def _fits(driver: _Driver, outcome: Outcome) -> None:
    """Conversations whose KV the GPU holds; twice, the second time with other prompts."""
    for attempt in range(2):
        rate, _ = await driver.rounds(f"fits-{attempt}", driver.plan.fits)
        outcome.fits_req_per_s.append(rate)


async def _exceeds(driver: _Driver, outcome: Outcome) -> None:
    """Conversations whose KV the GPU can't hold."""
    rate, ttfts = await driver.rounds("exceeds", driver.plan.exceeds)
    outcome.exceeds_req_per_s.append(rate)
    outcome.exceeds_ttft_ms = ttfts


_SCENARIOS = {"long": _long, "reload": _reload, "fits": _fits, "exceeds": _exceeds}


def _counters() -> dict[str, float]:
    from prometheus_client import REGISTRY

    return {
        sample.name + json.dumps({name: value for name, value in sample.labels.items() if name not in ("engine", "model_name")}):
        sample.value
        for metric in REGISTRY.collect() for sample in metric.samples
        if ("kv_offload" in sample.name or "kvbm" in sample.name) and not sample.name.endswith(("_bucket", "_created"))
    }


if __name__ == "__main__":
    main()
