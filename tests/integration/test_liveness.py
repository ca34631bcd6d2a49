# SPDX-License-Identifier: Apache-2.0
"""Liveness under full load: a supervisor that asks `/live` each second must never be told to restart a worker that is only busy.

`TANDEM_TEST_LIVENESS_S` is how long (default 600). The load: twice as many streams as the engine takes at once, prompts of 20 to 1,500
tokens in steps of up to 2,048, answers of 1 to 200 tokens, on the embedded model; client and server share the cores that there are.

Run for 600 s with server and client on one core of a busy machine of two (load average 9 to 13): 598 answers, all 200; the slowest after
1.9 s, one above 1 s. So a probe needs a timeout of some seconds on such a host.
"""

import asyncio
import os
import random
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from calls import Call, collect, connect
from servers import Server, serve

DURATION_S = float(os.environ.get("TANDEM_TEST_LIVENESS_S") or 600)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(DURATION_S + 1200)]

SLOTS = 16
ANSWER_S = 10.0
"""What a probe waits for an answer; a Kubernetes probe of 1 s would call these late, so they are counted."""
LATE_S = 1.0


@dataclass
class Watch:
    """What `/live` answered, once a second."""

    answers: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    late: int = 0

    def look(self, url: str) -> None:
        """One probe."""
        started = time.monotonic()
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
                self.answers[str(answer.status)] += 1
        except OSError as exc:
            self.answers[str(exc)] += 1
        taken = time.monotonic() - started
        self.slowest_s = max(self.slowest_s, taken)
        self.late += taken > LATE_S


async def _probe(url: str, watch: Watch, until: float) -> None:
    while (now := time.monotonic()) < until:
        await asyncio.to_thread(watch.look, url)
        await asyncio.sleep(max(0.0, now + 1.0 - time.monotonic()))  # the interval is the subject of the test


async def _stream(server: Server, seed: int, until: float) -> int:
    """Requests one after the other; how many there were. Any error fails the test."""
    rng, served = random.Random(seed), 0
    async with connect(server.grpc_url) as client:
        while time.monotonic() < until:
            prompt = [rng.randrange(100, 30_000) for _ in range(rng.choice((20, 200, 700, 1500)))]
            await collect(client, Call("vllm", prompt, {"max_tokens": rng.randint(1, 200), "ignore_eos": True}))
            served += 1
    return served


async def test_liveness_does_not_flap_under_full_load(tmp_path: Path) -> None:
    """Every probe is answered with 200, and so is every request."""
    sizes = ["--max-num-seqs", str(SLOTS), "--max-num-batched-tokens", "2048", "--max-model-len", "2048"]
    with serve(tmp_path, "--mode", "agg", "--routers", "0", *sizes) as server:
        watch, until = Watch(), time.monotonic() + DURATION_S
        probing = asyncio.create_task(_probe(f"{server.admin_url('vllm')}/live", watch, until))
        served = await asyncio.gather(*(_stream(server, seed, until) for seed in range(2 * SLOTS)))
        await probing
        print(f"{DURATION_S:.0f} s: {sum(served)} requests; /live {dict(watch.answers)}, "  # noqa: T201 - the figures are the result
              f"slowest {watch.slowest_s:.2f} s, {watch.late} above {LATE_S:g} s")
        assert set(watch.answers) == {"200"}
        assert watch.answers["200"] > DURATION_S / ANSWER_S
        assert min(served) > 0
