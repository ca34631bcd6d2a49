# SPDX-License-Identifier: Apache-2.0
"""Warm restarts of a router over mock workers: what it begins with, what it replays, and that nothing stale stays."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from models import make_tiny_model
from routers import LocalRouter, Mocks, mocks, router, until
from tandem_router.snapshot import unpack

pytestmark = pytest.mark.slow

Content = dict[str, set[tuple[int, ...]]]


def prompt(seed: int) -> list[int]:
    """Token ids of eight blocks of 16, and one more."""
    return [(seed * 7919 + i * 31) % 30000 + 1 for i in range(129)]


def content(local: LocalRouter) -> Content:
    """Worker -> what the index holds of it."""
    local.router.index.check_integrity()
    members = (member for member, _ in unpack(local.router.index.dump()))
    return {member.name: set(map(tuple, member.rows[member.rows[:, 1] != 0].tolist())) for member in members}


def serve(local: LocalRouter, seeds: range) -> None:
    """Sends prompts and waits for the answers."""
    assert all(one.text for one in [local.send(prompt(seed), max_tokens=20) for seed in seeds])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's."""
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Mocks]:
    """Two workers with so few blocks that they evict."""
    with mocks(tmp_path / "discovery", "--workers", "2", "--speedup", "20", "--blocks", "300") as running:
        yield running


def settings(tmp_path: Path, interval_s: str = "3600") -> dict[str, str]:
    """A snapshot folder of this test."""
    return {"TANDEM_ROUTER_SNAPSHOT_FOLDER": str(tmp_path / "snapshots"), "TANDEM_ROUTER_SNAPSHOT_INTERVAL_S": interval_s}


def test_a_restarted_router_replays_what_it_missed(tmp_path: Path, workers: Mocks, tokenizer: Path) -> None:
    """Blocks stored and evicted while it was away: its index equals that of a router that heard everything, at a fraction of the events."""
    store = tmp_path / "discovery"
    with router(store, 2, tokenizer, **settings(tmp_path)) as first:
        serve(first, range(30))
    with router(store, 2, tokenizer) as meanwhile:
        serve(meanwhile, range(30, 50))
    with router(store, 2, tokenizer, **settings(tmp_path)) as restarted, router(store, 2, tokenizer) as fresh:
        assert restarted.metric("tandem_router_snapshots_total") == 1
        until(lambda: content(restarted) == content(fresh), "equal indexes")
        assert min(map(len, content(fresh).values())) > 100
        again, heard = ([state.batches for state in one.router.feed.state()] for one in (restarted, fresh) if one.router.feed)
        assert sum(again) < sum(heard) * 0.7
        states = restarted.router.feed.state() if restarted.router.feed else ()
        assert [(state.resyncs, state.restarts, state.lost) for state in states] == [(0, 0, 0)] * 2


def test_a_crashed_router_begins_with_its_last_save(tmp_path: Path, workers: Mocks, tokenizer: Path) -> None:
    """The file of the interval is used without a clean end; a worker that died meanwhile leaves the index."""
    store, file = tmp_path / "discovery", tmp_path / "snapshots" / "router-0.index"
    with router(store, 2, tokenizer, **settings(tmp_path, "0.1")) as first:
        serve(first, range(10))
        until(file.exists, "a save")
        kept = file.read_bytes()
        serve(first, range(10, 20))
    file.write_bytes(kept)  # as if it had been killed then
    workers.kill(0)
    with router(store, 1, tokenizer, **settings(tmp_path)) as restarted, router(store, 1, tokenizer) as fresh:
        # Equal is not yet done: until its record ends, both may list the dead worker.
        until(lambda: content(restarted) == content(fresh) and list(content(restarted)) == restarted.placed(),
              "equal indexes, without the dead worker")


def test_a_damaged_snapshot_costs_only_the_warmth(tmp_path: Path, workers: Mocks, tokenizer: Path) -> None:
    """It is said and counted; the next clean end replaces it."""
    file = tmp_path / "snapshots" / "router-0.index"
    file.parent.mkdir()
    file.write_bytes(b"nonsense")
    with router(tmp_path / "discovery", 2, tokenizer, **settings(tmp_path)) as local:
        assert b'tandem_router_snapshots_total{outcome="refused"} 1.0' in local.router.metrics.exposition()
        serve(local, range(3))
        kept = content(local)
    with router(tmp_path / "discovery", 2, tokenizer, **settings(tmp_path)) as local:
        assert b'tandem_router_snapshots_total{outcome="restored"} 1.0' in local.router.metrics.exposition()
        assert all(kept[name] <= held for name, held in content(local).items())
