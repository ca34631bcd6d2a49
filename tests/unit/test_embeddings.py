# SPDX-License-Identifier: Apache-2.0
"""Embeddings that engines leave for each other: bounded, checked, and never another image's or another model's."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_worker.encode.config import EmbeddingSettings, embedding_transfer, load_settings
from tandem_worker.encode.stats import COUNTERS, EmbeddingCounters
from tandem_worker.encode.store import Bounds, Embedding, EmbeddingStore

EMBEDDING = Embedding("float32", (2, 3), bytes(range(24)))
TTL_S = 100.0
FILE_BYTES = 1000
"""More than one of these files has."""


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """At some time."""
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> EmbeddingStore:
    """With room for many."""
    return EmbeddingStore(tmp_path / "store", "model", Bounds(100 * FILE_BYTES, TTL_S), clock)


def only_file(tmp_path: Path) -> Path:
    """Of the store."""
    [path] = (tmp_path / "store").glob("*.embedding")
    return path


def test_what_was_stored_comes_back(store: EmbeddingStore, tmp_path: Path, clock: Clock) -> None:
    """Also in another process's object; nothing else does."""
    assert store.put("a", EMBEDDING)
    other = EmbeddingStore(tmp_path / "store", "model", Bounds(1, TTL_S), clock)
    assert (store.get("a"), other.get("a")) == (EMBEDDING, EMBEDDING)
    assert (store.has("a"), store.has("b"), store.get("b")) == (True, False, None)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


def test_another_model_does_not_see_it(store: EmbeddingStore, tmp_path: Path, clock: Clock) -> None:
    """Though it uses the same folder."""
    store.put("a", EMBEDDING)
    other = EmbeddingStore(tmp_path / "store", "other", Bounds(100 * FILE_BYTES, TTL_S), clock)
    assert not other.has("a")
    assert other.get("a") is None


@pytest.mark.parametrize("spoil", [
    lambda raw: raw[:-1], lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:],
    lambda raw: raw + b"x", lambda raw: b"X" + raw[1:],
])  # fmt: skip
def test_a_torn_or_spoilt_file_is_a_miss_and_goes(store: EmbeddingStore, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    """Never other numbers."""
    store.put("a", EMBEDDING)
    path = only_file(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    os.utime(path, (1_700_000_000, 1_700_000_000))
    assert store.get("a") is None
    assert not path.exists()


def test_a_file_under_a_wrong_name_is_a_miss(store: EmbeddingStore, tmp_path: Path) -> None:
    """Somebody renamed it: the content says whose it is."""
    store.put("a", EMBEDDING)
    a = only_file(tmp_path)
    store.put("b", EMBEDDING)
    [b] = [path for path in (tmp_path / "store").glob("*.embedding") if path != a]
    a.replace(b)
    assert store.get("b") is None


def test_unused_embeddings_go_after_their_time(store: EmbeddingStore, clock: Clock) -> None:
    """A use keeps one; those that expired are misses at once and are deleted with the next that is stored."""
    for name in ("used", "unused"):
        store.put(name, EMBEDDING)
    clock.now += TTL_S - 1
    assert store.get("used") == EMBEDDING
    clock.now += 2
    assert (store.has("used"), store.has("unused"), store.get("unused")) == (True, False, None)
    both = store.size_bytes()
    store.put("new", EMBEDDING)
    assert store.size_bytes() <= both


def test_the_folder_never_grows_beyond_its_bound(tmp_path: Path, clock: Clock) -> None:
    """The least recently used go first; what is larger than the whole isn't stored."""
    store = EmbeddingStore(tmp_path / "store", "model", Bounds(3 * FILE_BYTES, TTL_S), clock)
    one = Embedding("uint8", (600,), bytes(600))
    for number in range(10):
        clock.now += 1
        assert store.put(str(number), one)
        clock.now += 1
        assert store.has("0")
        assert store.size_bytes() <= 3 * FILE_BYTES
    assert [number for number in range(10) if store.has(str(number))] == [0, 7, 8, 9]
    assert not store.put("huge", Embedding("uint8", (4000,), bytes(4000)))
    assert not store.has("huge")


def test_partial_files_of_the_dead_are_swept(store: EmbeddingStore, tmp_path: Path, clock: Clock) -> None:
    """They count, and expire like all."""
    dead = tmp_path / "store" / ".partial-1-x.embedding"
    dead.write_bytes(bytes(100))
    os.utime(dead, (clock.now, clock.now))
    assert store.size_bytes() == 100
    clock.now += TTL_S + 1
    store.put("a", EMBEDDING)
    assert not dead.exists()


def test_a_writer_that_hangs_holds_nobody_up(store: EmbeddingStore, tmp_path: Path) -> None:
    """The engine's step goes on without storing, and the next may store again."""
    with (tmp_path / "store" / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not store.put("a", EMBEDDING)
    assert store.put("a", EMBEDDING)


def test_a_folder_that_went_is_no_error(store: EmbeddingStore, tmp_path: Path) -> None:
    """Nothing is found, nothing is stored."""
    (tmp_path / "store").rmdir()
    assert not store.put("a", EMBEDDING)
    assert store.get("a") is None


def test_roles_become_producers_and_consumers() -> None:
    """Only where there is a folder; an encode worker needs one."""
    settings = load_settings({"TANDEM_EMBEDDING_FOLDER": "/shared", "TANDEM_EMBEDDING_MAX_GB": "0.5"})
    transfers = {role: embedding_transfer(settings, role) for role in Role if role is not Role.OMNI}
    assert {role: transfer and transfer["ec_role"] for role, transfer in transfers.items()} == {
        Role.AGGREGATED: "ec_consumer", Role.PREFILL: "ec_consumer", Role.DECODE: "ec_consumer", Role.ENCODE: "ec_producer"}
    extra = transfers[Role.ENCODE]
    assert extra is not None
    assert extra["ec_connector_extra_config"] == {"folder": "/shared", "max_bytes": 500_000_000, "ttl_s": 600.0}
    assert embedding_transfer(EmbeddingSettings(), Role.AGGREGATED) is None
    with pytest.raises(ConfigError, match="TANDEM_EMBEDDING_FOLDER"):
        embedding_transfer(EmbeddingSettings(), Role.ENCODE)


def test_counters_begin_anew_when_taken() -> None:
    """Every name that can be counted has a text."""
    counters = EmbeddingCounters()
    counters.ended(is_there=True)
    counters.ended(is_there=False)
    counters.loaded(20)
    counters.missed()
    taken = counters.take()
    assert taken.keys() == COUNTERS.keys()
    assert taken["embedding_bytes_loaded"] == 20
    assert counters.take() == {}


class ScheduledRequest(SimpleNamespace):
    """What the connector reads of vLLM's request."""


def connector(folder: Path, ec_role: str) -> Any:
    """One process's object, over a model that is none."""
    from vllm.config import ECTransferConfig
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

    from tandem_worker.encode.connector import EmbeddingConnector

    transfer = ECTransferConfig(ec_connector="EmbeddingConnector", ec_connector_module_path="tandem_worker.encode.connector",
                                ec_role=ec_role, ec_connector_extra_config={"folder": str(folder), "max_bytes": 10**6, "ttl_s": 600})
    model = SimpleNamespace(model=str(folder), revision=None, dtype="float32", quantization=None, multimodal_config=None)
    return EmbeddingConnector(SimpleNamespace(ec_transfer_config=transfer, model_config=model), ECConnectorRole.SCHEDULER)


def test_a_consumer_loads_the_bytes_that_it_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the file goes or changes between the promise and the step."""
    import torch

    monkeypatch.setattr("tandem_worker.encode.connector.get_tensor_model_parallel_rank", lambda: 0)
    made = {"a": torch.randn(4, 8, dtype=torch.bfloat16), "b": torch.randn(2, 8)}
    producer, consumer = connector(tmp_path, "ec_producer"), connector(tmp_path, "ec_consumer")
    for name in made:
        producer.save_caches(made, name)
    assert producer.has_cache_item("a")
    request = ScheduledRequest(mm_features=[SimpleNamespace(identifier=name) for name in ("a", "b", "c")])
    assert [consumer.has_cache_item(name) for name in ("a", "b", "c")] == [True, True, False]
    for path in tmp_path.glob("*.embedding"):
        path.unlink()
    for index in range(3):
        consumer.update_state_after_alloc(request, index)
    consumer.bind_connector_metadata(consumer.build_connector_meta(None))
    cache: dict[str, Any] = {}
    consumer.start_load_caches(cache)
    assert cache.keys() == made.keys()
    assert all(torch.equal(cache[name], made[name]) and cache[name].dtype == made[name].dtype for name in made)
    assert consumer.build_connector_meta(None).embeddings == {}
    stats = consumer.get_ec_connector_stats()
    assert stats.data == {"embeddings_loaded": 2, "embedding_bytes_loaded": 4 * 8 * 2 + 2 * 8 * 4, "embeddings_missed": 1}
    assert consumer.get_ec_connector_stats() is None
    producer.request_finished(request)
    assert producer.get_ec_connector_stats().data == {"embeddings_lost": 3}


def test_a_consumer_saves_nothing(tmp_path: Path) -> None:
    """What it encodes by itself stays its own."""
    import torch

    connector(tmp_path, "ec_consumer").save_caches({"a": torch.zeros(1)}, "a")
    assert list(tmp_path.glob("*.embedding")) == []
