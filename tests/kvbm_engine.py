# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine with KV tiers, in a process of its own, for tests that compare workers or lose them.

Run as a program it is the child: engine arguments as JSON in its one argument, then one JSON command per line on stdin and one JSON
answer per line on the descriptor that the parent gave. `Engine` is the parent's side.
"""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from select import select
from types import TracebackType
from typing import IO, Any

from tandem_worker.tiers import METHOD

START_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 600.0
CONCURRENCY = 8
BLOCK_SIZE = 32
"""Tokens; the smallest that vLLM's CPU attention takes."""


@dataclass(frozen=True)
class Answer:
    """One request's result."""

    ids: tuple[int, ...]
    cached: int
    """Prompt tokens that were not computed, as the engine says."""
    seconds: float


class Engine:
    """A running engine. Tier settings are environment variables, as in production; empty ones mean an engine without tiers."""

    def __init__(self, model: Path, log: Path, tiers: dict[str, str] | None = None, **arguments: Any) -> None:
        given: dict[str, Any] = {
            "model": str(model), "dtype": "float32", "block_size": BLOCK_SIZE, "max_model_len": 2048, "max_num_seqs": CONCURRENCY,
            "enforce_eager": True, "seed": 0, **arguments,
        }
        if tiers:
            given["kv_transfer_config"] = {
                "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"spec_name": "KvbmSpec", "spec_module_path": "tandem_kvbm.spec"},
            }
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO", **(tiers or {})}
        read, write = os.pipe()
        self._answers = os.fdopen(read, "rb", buffering=0)
        self._log = log.open("ab")
        self.log = log
        self.process = subprocess.Popen([sys.executable, __file__, json.dumps(given), str(write)], stdin=subprocess.PIPE, stdout=self._log,
                                        stderr=self._log, pass_fds=(write,), env={**os.environ, **variables}, start_new_session=True)
        os.close(write)
        self._buffer = b""

    def __enter__(self) -> "Engine":
        self._answer(START_TIMEOUT_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def generate(self, prompts: list[list[int]], max_tokens: int, concurrency: int = CONCURRENCY) -> list[Answer]:
        """Greedy, `concurrency` at a time, in order of the prompts."""
        answers = self._call({"what": "generate", "prompts": prompts, "max_tokens": max_tokens, "concurrency": concurrency})
        return [Answer(tuple(ids), cached, seconds) for ids, cached, seconds in answers]

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """Of the likeliest next tokens."""
        return {int(token): chance for token, chance in self._call({"what": "logprobs", "prompt": prompt}).items()}

    def reset_device(self) -> None:
        """Empties the device's prefix cache."""
        assert self._call({"what": "reset"}) is True

    def forget(self) -> None:
        """Empties the device's cache and the host tier: the next prompt has to come from the tiers below."""
        self.reset_device()
        assert self._call({"what": "tiers", "command": "reset", "tier": "G2"})["reset"] is True

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels; 0 if there is none."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        lines = str(self._call({"what": "metrics"})).splitlines()
        named = [line for line in lines if line.split("{")[0].split(" ")[0] in (name, f"{name}_total")]
        found = [line for line in named if all(part in line for part in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def close(self) -> None:
        """Ends it in order; kills what is left."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
        self._answers.close()
        self._log.close()

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        os.killpg(self.process.pid, 9)
        self.process.wait(30)

    def _call(self, command: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer(CALL_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> Any:
        while b"\n" not in self._buffer:
            assert select([self._answers], [], [], timeout_s)[0], f"the engine did not answer within {timeout_s} s; see {self.log}"
            data = self._answers.read(1 << 20)
            assert data, f"the engine ended: {self.log.read_text(errors='replace')[-3000:]}"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


async def _serve(arguments: dict[str, Any], answers: IO[bytes]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    answers.write(b"true\n")
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        answers.write(json.dumps(await _obey(engine, json.loads(line))).encode() + b"\n")
    engine.shutdown()


async def _obey(engine: Any, command: dict[str, Any]) -> Any:
    match command["what"]:
        case "generate":
            gate = asyncio.Semaphore(command["concurrency"])
            return await asyncio.gather(*(_generate(engine, gate, prompt, command["max_tokens"]) for prompt in command["prompts"]))
        case "logprobs":
            return await _logprobs(engine, command["prompt"])
        case "reset":
            return bool(await engine.reset_prefix_cache())
        case "tiers":
            return dict(await engine.engine_core.call_utility_async(METHOD, command["command"], command["tier"]))
        case "metrics":
            from prometheus_client import REGISTRY, generate_latest

            return generate_latest(REGISTRY).decode()
    raise AssertionError(command)


_numbers = itertools.count()


async def _final(engine: Any, prompt: list[int], **sampling: Any) -> Any:
    from vllm import SamplingParams

    stream = engine.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, **sampling), f"r{next(_numbers)}")
    outputs = [output async for output in stream]
    return outputs[-1]


async def _generate(engine: Any, gate: asyncio.Semaphore, prompt: list[int], max_tokens: int) -> tuple[list[int], int, float]:
    async with gate:
        started = asyncio.get_running_loop().time()
        last = await _final(engine, prompt, max_tokens=max_tokens, ignore_eos=True)
        return list(last.outputs[0].token_ids), last.num_cached_tokens or 0, asyncio.get_running_loop().time() - started


async def _logprobs(engine: Any, prompt: list[int]) -> dict[int, float]:
    last = await _final(engine, prompt, max_tokens=1, ignore_eos=True, logprobs=20)
    return {token: entry.logprob for token, entry in last.outputs[0].logprobs[0].items()}


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[2]), "wb", buffering=0) as descriptor:
        asyncio.run(_serve(json.loads(sys.argv[1]), descriptor))
