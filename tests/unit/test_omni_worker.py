# SPDX-License-Identifier: Apache-2.0
"""The omni worker around a scripted pipeline: admin port, metrics, discovery, loss and end; threads and sockets are real."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from fakes import WAIT_S, reader
from omni_pipelines import RecordingSink, ScriptedPipeline, words
from tandem_protocol import workers
from tandem_protocol.discovery import open_discovery
from tandem_protocol.errors import RequestCancelledError, UnavailableError
from tandem_protocol.requests import Envelope
from tandem_protocol.roles import Role
from tandem_worker import heartbeat
from tandem_worker.config import WorkerSettings
from tandem_worker.omni import worker as omni_worker
from tandem_worker.omni.requests import parse_omni_request
from tandem_worker.omni.worker import OmniWorker, watched
from tandem_worker.status import WorkerState
from tandem_worker.surroundings import Surroundings

LOOK_S = 0.02
HANG_S = 1.0


class Sink(RecordingSink):
    """One that a thread can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def send(self, arrays: Any, *, final: bool) -> None:
        """Records one response."""
        super().send(arrays, final=final)
        if final:
            self.ended.set()

    def fail(self, error: Any) -> None:
        """Records the error."""
        super().fail(error)
        self.ended.set()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often the worker ended its server; nothing of this process's environment changes, and no guard starts."""
    told: list[str] = []
    monkeypatch.setattr(Surroundings, "enter", lambda *_: None)
    monkeypatch.setattr(OmniWorker, "_end_server", lambda _: told.append("ended"))
    monkeypatch.setattr(heartbeat, "INTERVAL_S", LOOK_S)
    monkeypatch.setattr(omni_worker, "_HEALTH_INTERVAL_S", LOOK_S)
    return told


@pytest.fixture
def pipeline() -> ScriptedPipeline:
    """Answers with two words."""
    return ScriptedPipeline((words("Pa", 5), words("ris", 6, end="stop")))


def started(folder: Path, pipeline: ScriptedPipeline, **more: Any) -> OmniWorker:
    """With an admin port of its own and a folder as discovery."""
    (folder / "model.json").write_text(json.dumps({"model": "tiny"}))
    given = {"role": Role.OMNI, "admin_port": 0, "drain_timeout_s": 1, "discovery": f"file:{folder / 'discovery'}", **more}
    worker = OmniWorker(WorkerSettings(**given), "omni", folder)
    worker.start(lambda _: pipeline)
    return worker


@pytest.fixture
def worker(tmp_path: Path, pipeline: ScriptedPipeline, ends: list[str]) -> Iterator[OmniWorker]:
    """A started one that is soon taken for hanging."""
    del ends
    running = started(tmp_path, pipeline, hang_timeout_s=HANG_S)
    yield running
    running.stop()


def ask(worker: OmniWorker, **given: Any) -> Sink:
    """Sends a streamed request."""
    assert worker.host is not None
    sink = Sink()
    worker.host.submit(parse_omni_request(reader({"text_input": "Say", "stream": [True], **given}), Envelope("mine", {})), sink)
    return sink


def answered(sink: Sink) -> Sink:
    """When it has ended."""
    assert sink.ended.wait(WAIT_S)
    return sink


def until(holds: Callable[[], bool]) -> None:
    """Waits for a condition."""
    event, deadline = threading.Event(), WAIT_S / LOOK_S
    while not holds():
        event.wait(LOOK_S)
        deadline -= 1
        assert deadline > 0


def get(worker: OmniWorker, path: str) -> tuple[int, str]:
    """(status, body) of the admin server."""
    try:
        with urlopen(f"http://127.0.0.1:{worker.admin_port}{path}", timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as exc:
        return exc.code, exc.read().decode()


def test_a_request_is_served_and_counted(worker: OmniWorker) -> None:
    """Text, tokens, and the end; the admin port tells the role and the figures."""
    sink = answered(ask(worker))
    assert b"".join(text for response in sink.responses for text in response.get("text_output", [])) == b"Paris"
    status, body = get(worker, "/health")
    assert (status, json.loads(body)["status"], json.loads(body)["role"]) == (200, "ready", "omni")
    metrics = get(worker, "/metrics")[1]
    assert 'dynamo_component_requests_total{dynamo_component="backend"' in metrics
    assert get(worker, "/kvbm")[0] == 404


def test_it_is_known_in_discovery(worker: OmniWorker, tmp_path: Path) -> None:
    """As an omni worker, which no router places anything on."""

    async def first() -> workers.WorkerRecord:
        discovery = open_discovery(f"file:{tmp_path / 'discovery'}")
        try:
            async with asyncio.timeout(WAIT_S):
                async for snapshot in discovery.watch():
                    if snapshot.records:
                        return snapshot.records[0]
        finally:
            await discovery.close()
        raise AssertionError

    record = asyncio.run(first())
    assert (record.role, record.triton_model, record.model) == (Role.OMNI, "omni", "tiny")
    assert record.admin_url.startswith("http://127.0.0.1:")


def test_a_request_is_aborted_by_its_id(worker: OmniWorker, pipeline: ScriptedPipeline) -> None:
    """And nothing of it stays in the pipeline."""
    pipeline.endless = True
    sink = ask(worker)
    until(lambda: bool(pipeline.orders))
    assert worker.host is not None
    assert worker.host.run(worker.host.abort("mine")).result(WAIT_S) == 1
    assert isinstance(answered(sink).error, RequestCancelledError)
    until(lambda: pipeline.closed == ["mine"])


def test_a_lost_stage_ends_the_server(worker: OmniWorker, pipeline: ScriptedPipeline, ends: list[str]) -> None:
    """What is in flight can go to another worker, and the reason is told."""
    pipeline.endless = True
    sink = ask(worker)
    until(lambda: bool(pipeline.orders))
    pipeline.sick = "Stage-1 has no live replica"
    assert isinstance(answered(sink).error, UnavailableError)
    until(lambda: ends == ["ended"])
    status, body = get(worker, "/live")
    assert (status, json.loads(body)["reason"]) == (503, "Stage-1 has no live replica")


def test_a_look_that_fails_does_not_end_the_watch(worker: OmniWorker, pipeline: ScriptedPipeline, ends: list[str]) -> None:
    """A stage that is lost later is seen."""
    pipeline.failure = AttributeError("stage_pools")
    until(lambda: pipeline.failure is None)
    assert worker.host is not None
    assert (worker.host.state, ends) == (WorkerState.READY, [])
    pipeline.sick = "Stage-0 has no live replica"
    until(lambda: ends == ["ended"])


def test_a_dead_pipeline_ends_the_server(worker: OmniWorker, pipeline: ScriptedPipeline, ends: list[str]) -> None:
    """Also when nobody asks it anything."""
    pipeline.errored = True
    until(lambda: ends == ["ended"])
    assert worker.host is not None
    assert worker.host.state is WorkerState.DEAD


def test_a_pipeline_that_dies_silently_leaves_no_request_waiting(worker: OmniWorker, pipeline: ScriptedPipeline, ends: list[str]) -> None:
    """Whatever should have failed it may be dead, too."""
    pipeline.endless = True
    sink = ask(worker)
    until(lambda: bool(pipeline.orders))
    pipeline.errored = True
    assert isinstance(answered(sink).error, UnavailableError)
    assert ends == ["ended"]


def test_an_idle_pipeline_shows_that_it_computes(tmp_path: Path, pipeline: ScriptedPipeline, ends: list[str]) -> None:
    """By one token of the stage that makes text; one that doesn't answer takes no requests until it does."""
    del ends
    worker = started(tmp_path, pipeline, health_check_enabled=True, canary_wait_time=LOOK_S, health_check_request_timeout=LOOK_S)
    try:
        until(lambda: bool(pipeline.orders))
        order = pipeline.orders[0]
        assert order.prompt == {"modalities": ["text"], "prompt": "Test"}
        assert (order.sampling, order.modalities) == (({"temperature": 0.0, "max_tokens": 1}, {}), ("text",))
        pipeline.endless = True
        until(lambda: worker.host is not None and worker.host.state is WorkerState.UNWELL)
        assert "did not answer a canary" in get(worker, "/health")[1]
    finally:
        worker.stop()


def test_a_pipeline_without_text_gets_no_canary(tmp_path: Path, pipeline: ScriptedPipeline, ends: list[str],
                                                caplog: pytest.LogCaptureFixture) -> None:
    """Which is told."""
    del ends
    pipeline.stages = pipeline.stages[1:]
    worker = started(tmp_path, pipeline, health_check_enabled=True, canary_wait_time=LOOK_S)
    worker.stop()
    assert "no canary is sent" in caplog.text
    assert pipeline.orders == []


def test_a_pipeline_that_stands_still_hangs(worker: OmniWorker, pipeline: ScriptedPipeline, ends: list[str]) -> None:
    """With work in it, and neither a step of a stage nor an output; each step begins its time anew."""
    pipeline.endless = True
    sink = ask(worker)
    assert worker.host is not None
    load = worker.host.generator.loads.of(0)
    until(lambda: load.in_engine == 1)
    before, pipeline.steps = load.steps, 7
    until(lambda: load.steps == before + 7)
    assert "the engine hangs: 1 requests in it" in str(answered(sink).error)
    until(lambda: ends == ["ended"])
    assert worker.host.state is WorkerState.HUNG


@pytest.mark.parametrize(("hang_timeout_s", "tells_steps", "watched_s"), [(30, True, 30), (30, False, math.inf), (0, False, 0)])
def test_where_steps_are_not_told_only_their_bound_holds(hang_timeout_s: float, tells_steps: bool, watched_s: float) -> None:
    """A long image is no hang; off is off."""
    settings = watched(WorkerSettings(hang_timeout_s=hang_timeout_s), ScriptedPipeline(tells_steps=tells_steps))
    assert settings.hang_timeout_s == watched_s


def test_the_end_drains_and_shuts_the_pipeline_down(worker: OmniWorker, pipeline: ScriptedPipeline) -> None:
    """A request that never ends gets its error within the bound."""
    pipeline.endless = True
    sink = ask(worker)
    until(lambda: bool(pipeline.orders))
    worker.stop()
    assert isinstance(answered(sink).error, UnavailableError)
    assert pipeline.ended
    worker.host = None
