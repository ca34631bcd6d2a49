# SPDX-License-Identifier: Apache-2.0
"""What one process computed comes back from host memory, from disk after a restart, and from an object store in another worker.

The first test is the shortest look at all tiers: one configuration, two starts of a random model of two layers in whose texts a wrong
block shows (88 s alone on two cores, most of it imports of vLLM). The last ones make the way to the object store fail under a
running engine.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm_engine import BLOCK_SIZE, Answer, Engine
from models import make_lively_model
from s3s import S3, Mood, Proxy, s3_server, tier_settings
from servers import wait_for

pytestmark = pytest.mark.slow

BLOCKS = 20
TOKENS = 8
HOST_BLOCKS, DISK_BLOCKS = 64, 24
SIZES = {"max_model_len": 1024, "num_gpu_blocks_override": 64}
HOST = {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(HOST_BLOCKS)}
WAIT_S = 60
OUTAGE_S = 10.0
LOOKUP_S, LOAD_S = 1.0, 15.0
"""How long an object tier may hold up a request, docs/limits.md."""
COMPUTE_S = 15.0
"""Far more than a request takes that computes all by itself on a busy machine."""


def make_prompt(number: int) -> list[int]:
    """Seeded; of so many full blocks and a few tokens more."""
    rng = random.Random(number)
    return [rng.randrange(1000, 40_000) for _ in range(BLOCKS * BLOCK_SIZE + 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under which each token depends on all before it."""
    return make_lively_model(tmp_path_factory.mktemp("lively") / "model")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """Where the objects go."""
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


def disk_settings(folder: Path, blocks: int) -> dict[str, str]:
    """The environment of an engine with a disk tier that takes every block."""
    return {"DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": str(blocks), "DYN_KVBM_DISK_CACHE_DIR": str(folder),
            "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true"}


def stored(engine: Engine, prompt: list[int], *tiers: str) -> Answer:
    """Computes the prompt and waits until its blocks are in these tiers."""
    before = {tier: engine.metric("kvbm_tier_stored", tier=tier) for tier in tiers}
    text = engine.generate([prompt], TOKENS)[0]
    assert text.cached == 0
    for tier, count in before.items():
        wait_for(lambda tier=tier, count=count: engine.metric("kvbm_tier_stored", tier=tier) >= count + BLOCKS, WAIT_S, f"blocks in {tier}")
    return text


def comes_back(engine: Engine, prompt: list[int], text: Answer) -> bool:
    """Whether at least 95 % of the prompt's full blocks were not computed; the text must be the same in any case."""
    again = engine.generate([prompt], TOKENS)[0]
    assert again.ids == text.ids
    return again.cached >= 0.95 * BLOCKS * BLOCK_SIZE


def onboarded(engine: Engine) -> tuple[float, float]:
    """Blocks that came from disk and from the object store."""
    return engine.metric("kvbm_onboard_blocks_d2d"), engine.metric("kvbm_onboard_blocks_o2d")


def test_blocks_come_back_from_every_tier(model: Path, s3: S3, tmp_path: Path) -> None:
    """From the host tier after the device's reset; in a new process from disk, and from the bucket what the disk has given up."""
    first, last = make_prompt(1), make_prompt(2)
    tiers = HOST | disk_settings(tmp_path, DISK_BLOCKS) | tier_settings(s3.url, s3.make_bucket("every-tier"))
    with Engine(model, tmp_path / "one.log", tiers | {"TANDEM_KVBM_WORKER_ID": "one"}, **SIZES) as engine:
        texts = [stored(engine, prompt, "DiskTier", "ObjectTier") for prompt in (first, last)]
        engine.reset_device()
        assert comes_back(engine, last, texts[1])
        assert engine.metric("kvbm_onboard_blocks_h2d") == BLOCKS
        assert onboarded(engine) == (0, 0)
    with Engine(model, tmp_path / "two.log", tiers | {"TANDEM_KVBM_WORKER_ID": "two"}, **SIZES) as engine:
        assert comes_back(engine, last, texts[1])
        assert onboarded(engine) == (BLOCKS, 0)
        assert comes_back(engine, first, texts[0])
        assert onboarded(engine) == (DISK_BLOCKS, 2 * BLOCKS - DISK_BLOCKS)


def test_two_workers_share_a_folder(model: Path, tmp_path: Path) -> None:
    """Each finds on disk what the other one has written since both started."""
    tiers = HOST | disk_settings(tmp_path, 4 * BLOCKS) | {"TANDEM_KVBM_DISK_SHARED": "true"}
    with Engine(model, tmp_path / "one.log", tiers, **SIZES) as one, Engine(model, tmp_path / "two.log", tiers, **SIZES) as two:
        for number, (writer, reader) in enumerate([(one, two), (two, one)]):
            prompt = make_prompt(20 + number)
            text = stored(writer, prompt, "DiskTier")
            assert comes_back(reader, prompt, text)
            assert onboarded(reader) == (BLOCKS, 0)


@pytest.fixture(scope="module")
def proxy(s3: S3) -> Iterator[Proxy]:
    """The way to the endpoint."""
    running = Proxy(s3.port)
    yield running
    running.close()


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    """What the workers share."""
    return s3.make_bucket("shared")


@pytest.fixture(scope="module")
def engine(model: Path, proxy: Proxy, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A worker with a host tier, and an object tier through the proxy."""
    tiers = HOST | tier_settings(proxy.url, bucket) | {"TANDEM_KVBM_WORKER_ID": "one"}
    with Engine(model, tmp_path_factory.mktemp("worker") / "engine.log", tiers, **SIZES) as running:
        yield running


def counted(engine: Engine, *names: str) -> float:
    """The sum of these counters of the object tier."""
    return sum(engine.metric(f"kvbm_tier_{name}", tier="ObjectTier") for name in names)


def test_another_worker_finds_what_the_first_one_wrote(engine: Engine, model: Path, s3: S3, bucket: str, tmp_path: Path) -> None:
    """Both run; the second has no disk, and never computed the prompt."""
    prompt = make_prompt(3)
    text = stored(engine, prompt, "ObjectTier")
    tiers = HOST | tier_settings(s3.url, bucket) | {"TANDEM_KVBM_WORKER_ID": "two"}
    with Engine(model, tmp_path / "other.log", tiers, **SIZES) as other:
        assert comes_back(other, prompt, text)
        assert onboarded(other) == (0, BLOCKS)


def test_an_endpoint_that_is_away_for_ten_seconds(engine: Engine, proxy: Proxy) -> None:
    """Requests go on, in bounded time and with the right texts; failures are counted; afterwards blocks come back again."""
    prompt = make_prompt(4)
    text = stored(engine, prompt, "ObjectTier")
    before = counted(engine, "lookup_failures", "read_failures", "write_failures", "dropped")
    proxy.mood, ends, fresh = Mood.DOWN, time.monotonic() + OUTAGE_S, []
    while time.monotonic() < ends:
        engine.forget()
        fresh.append(make_prompt(100 + len(fresh)))
        answers = engine.generate([prompt, fresh[-1]], TOKENS)
        assert answers[0].ids == text.ids
        assert max(one.seconds for one in answers) < LOOKUP_S + LOAD_S + COMPUTE_S
    wait_for(lambda: counted(engine, "lookup_failures", "read_failures", "write_failures", "dropped") > before, WAIT_S, "the failures")
    assert engine.metric("kvbm_bucket_breaker_opened") >= 1
    proxy.mood = Mood.GOOD
    wait_for(lambda: engine.forget() or comes_back(engine, prompt, text), WAIT_S, "the bucket is used again")
    alone = [one.ids for one in engine.generate(fresh, TOKENS, concurrency=1)]
    engine.forget()
    assert [one.ids for one in engine.generate(fresh, TOKENS)] == alone


def test_an_endpoint_that_is_too_slow_delays_a_request_once(engine: Engine, proxy: Proxy) -> None:
    """Blocks trickle in: the load ends at its deadline, the request computes what is missing, and the next one does not wait again."""
    prompt = make_prompt(5)
    text = stored(engine, prompt, "ObjectTier")
    before = counted(engine, "read_failures", "expired_loads")
    engine.forget()
    proxy.mood = Mood.TRICKLE
    again = engine.generate([prompt], TOKENS)[0]
    assert again.ids == text.ids
    assert again.seconds < LOOKUP_S + LOAD_S + COMPUTE_S
    wait_for(lambda: counted(engine, "read_failures", "expired_loads") > before, WAIT_S, "the failed loads")
    engine.forget()
    soon = engine.generate([prompt], TOKENS)[0]
    assert soon.ids == text.ids
    assert soon.seconds < LOOKUP_S + COMPUTE_S
    proxy.mood = Mood.GOOD
    wait_for(lambda: engine.forget() or comes_back(engine, prompt, text), WAIT_S, "the bucket is used again")


def test_an_object_that_arrives_wrong_is_recomputed(engine: Engine, proxy: Proxy) -> None:
    """The lookup finds the blocks, and every one is damaged on its way: counted, never used, computed and written anew."""
    prompt = make_prompt(6)
    text = stored(engine, prompt, "ObjectTier")
    before = counted(engine, "corrupt")
    engine.forget()
    proxy.mood = Mood.FLIP
    again = engine.generate([prompt], TOKENS)[0]
    assert (again.ids, again.cached) == (text.ids, 0)
    wait_for(lambda: counted(engine, "corrupt") == before + BLOCKS, WAIT_S, "the wrong blocks counted")
    proxy.mood = Mood.GOOD
    wait_for(lambda: engine.forget() or comes_back(engine, prompt, text), WAIT_S, "the blocks in the bucket again")
