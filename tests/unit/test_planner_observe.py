# SPDX-License-Identifier: Apache-2.0
"""What the planner sees: figures that are whole, fresh and finite, or a sentence in their place."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import web

from discovery_contract import worker
from tandem_planner import queries
from tandem_planner.observe import Observer, WorkerFigures, read_loads, read_traffic
from tandem_planner.prometheus import Prometheus, Sample
from tandem_planner.queries import Source, TrafficQueries
from tandem_planner.terms import Latency, Pool, WorkerLoad
from tandem_protocol.errors import UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord, WorkerState

FIGURES: Mapping[str, float] = {
    "requests": 90, "age": 2, "isl": 3000, "osl": 300, "request_s": 9, "cached_fraction": 1 / 3,
    "ttft_mean": 0.2, "ttft_p50": 0.1, "ttft_p95": 0.4, "ttft_p99": 0.5,
    "itl_mean": 0.02, "itl_p50": 0.01, "itl_p95": 0.03, "itl_p99": 0.04,
}


def answers(**changes: float | None) -> dict[str, tuple[Sample, ...]]:
    """One series per figure; None for none."""
    return {name: () if value is None else (Sample({}, value),) for name, value in {**FIGURES, **changes}.items()}


def test_every_figure_of_the_traffic_is_asked_for() -> None:
    """The reader and the queries have the same names, for both sources."""
    for source in Source:
        assert set(TrafficQueries(source).over(180)) == set(FIGURES)


def test_the_reference_expressions() -> None:
    """Means are increase over increase, of one model and namespace, in milliseconds of window."""
    asked = TrafficQueries(Source.DYNAMO, "Meta/Llama-3.1", "prod").over(180)
    labels = '{model=~"(?i)Meta/Llama-3\\\\.1",dynamo_namespace="prod"}'
    assert asked["isl"] == (f"sum(increase(dynamo_frontend_input_sequence_tokens_sum{labels}[180000ms])) / "
                            f"sum(increase(dynamo_frontend_input_sequence_tokens_count{labels}[180000ms]))")
    assert asked["requests"] == f"sum(increase(dynamo_frontend_request_duration_seconds_count{labels}[180000ms]))"


def test_requests_of_a_router_are_those_that_came_and_not_those_that_ended() -> None:
    """First tokens, and how many more wait for theirs; a router that tells of none that wait is read all the same."""
    assert TrafficQueries().over(0.5)["requests"] == ("sum(increase(tandem_router_input_sequence_tokens_count[500ms])) + "
                                                      "(sum(delta(tandem_router_queued_requests[500ms])) or vector(0))")


def test_whole_figures_become_traffic() -> None:
    """With percentiles and the share of cached tokens."""
    seen = read_traffic(answers(), 180)
    assert seen.missing == ()
    assert seen.traffic is not None
    assert seen.traffic.ttft == Latency(mean=0.2, p50=0.1, p95=0.4, p99=0.5)
    assert (seen.traffic.requests, seen.traffic.isl, seen.traffic.cached_fraction) == (90, 3000, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"requests": None}, "no metrics of requests"),
        ({"requests": math.nan}, "no metrics of requests"),
        ({"age": None}, "no metrics of requests"),
        ({"age": 181}, "181 s old"),
        ({"ttft_mean": math.nan}, "no finite figure for ttft_mean"),
        ({"itl_p99": math.inf, "osl": None}, "no finite figure for osl, itl_p99"),
        ({"isl": -3}, "no finite figure for isl"),
    ],
)
def test_anything_else_is_no_traffic_but_a_sentence(changes: dict[str, float | None], sentence: str) -> None:
    """Missing, stale, NaN, infinite or negative."""
    seen = read_traffic(answers(**changes), 180)
    assert seen.traffic is None
    assert len(seen.missing) == 1
    assert sentence in seen.missing[0]


def test_an_interval_without_requests_is_no_traffic_and_nothing_is_missing() -> None:
    """Its means are NaN, which is nobody's fault."""
    seen = read_traffic(answers(requests=0, isl=math.nan, ttft_mean=math.nan), 180)
    assert (seen.traffic, seen.missing) == (None, ())


def test_unknown_cached_tokens_count_as_none_and_are_said() -> None:
    """It errs towards more workers."""
    seen = read_traffic(answers(cached_fraction=None), 180)
    assert seen.traffic is not None
    assert seen.traffic.cached_fraction == 0
    assert "cached tokens are not known" in seen.missing[0]


ADMIN = {"instance": "127.0.0.1:8081", "model_name": "served"}


def figures(*, needs_router: bool = True, **changes: tuple[Sample, ...]) -> WorkerFigures:
    """Of the worker `vllm-1`, behind 127.0.0.1:8081, with two ranks."""
    whole = {
        "kv": (Sample(ADMIN, 0.5), Sample({"instance": "other:1"}, 0.9)), "waiting": (Sample(ADMIN, 3),), "age": (Sample(ADMIN, 1),),
        "prefill": (Sample({"worker": "vllm-1/0"}, 100), Sample({"worker": "vllm-1/1"}, 20), Sample({"worker": "vllm-11/0"}, 7)),
        "active": (Sample({"worker": "vllm-1/0"}, 4), Sample({"worker": "vllm-1/1"}, 1)),
        "router_age": (Sample({"worker": "vllm-1/0"}, 1), Sample({"worker": "vllm-1/1"}, 2)),
    }
    return WorkerFigures({**whole, **changes}, max_age_s=30, needs_router=needs_router)


def test_a_workers_load_is_found_by_its_admin_port_and_id() -> None:
    """Over its ranks, and nobody else's."""
    loads, missing = read_loads([worker()], figures())
    assert loads == {Role.AGGREGATED: (WorkerLoad("vllm-1", queued_requests=3, queued_prefill_tokens=120, kv_use=0.5, active_requests=5),)}
    assert missing == ()


def test_an_encode_worker_is_not_known_without_its_requests() -> None:
    """Which only routers count; another role's load is whole without them."""
    for role, known in ((Role.ENCODE, False), (Role.PREFILL, True)):
        loads, missing = read_loads([worker(role=role)], figures(active=()))
        assert (role in loads, not missing) == (known, known)
    assert read_loads([worker(role=Role.ENCODE)], figures(needs_router=False, active=()))[1] == ()


def test_workers_behind_one_port_are_told_apart_by_their_model() -> None:
    """As mock workers are."""
    both = [worker("a", triton_model="m_0"), worker("b", triton_model="m_1")]
    of = {name: {"instance": "127.0.0.1:8081", "model_name": name} for name in ("m_0", "m_1")}
    loads, missing = read_loads(both, figures(
        needs_router=False, kv=(Sample(of["m_0"], 0.1), Sample(of["m_1"], 0.2)), waiting=(Sample(of["m_0"], 1), Sample(of["m_1"], 2)),
        age=(Sample(of["m_0"], 0), Sample(of["m_1"], 99)),
    ))
    assert [(load.id, load.kv_use) for load in loads[Role.AGGREGATED]] == [("a", 0.1)]
    assert "no fresh metrics of worker b" in missing[0]


@pytest.mark.parametrize(
    "changes",
    [{"kv": ()}, {"kv": (Sample(ADMIN, math.nan),)}, {"kv": (Sample(ADMIN, 1.5),)}, {"waiting": ()}, {"age": (Sample(ADMIN, 31),)},
     {"prefill": ()}, {"prefill": (Sample({"worker": "vllm-1/0"}, math.nan),)}, {"router_age": ()},
     {"router_age": (Sample({"worker": "vllm-1/0"}, 31),)}],
)
def test_a_worker_that_is_not_wholly_known_is_missing(changes: dict[str, tuple[Sample, ...]]) -> None:
    """Its load is not zero."""
    loads, missing = read_loads([worker()], figures(**changes))
    assert loads == {}
    assert "no fresh metrics of worker vllm-1" in missing[0]


def test_workers_that_take_no_requests_are_not_looked_for() -> None:
    """A draining worker is neither load nor loss."""
    assert read_loads([worker(state=WorkerState.DRAINING)], figures(kv=())) == ({}, ())


def test_a_pipelines_worker_is_no_load_of_a_pool() -> None:
    """Routers place nothing on it, so that nothing of theirs is missing."""
    assert read_loads([worker(), worker("omni-1", role=Role.OMNI)], figures()) == read_loads([worker()], figures())


class Told:
    """Answers every query with one number, or fails."""

    def __init__(self, failure: str = "") -> None:
        self.failure = failure
        self.asked: list[str] = []

    async def query(self, expression: str) -> tuple[Sample, ...]:
        """One series without labels."""
        self.asked.append(expression)
        if self.failure:
            raise UnavailableError(self.failure)
        return (Sample({}, 2.0),)

    async def close(self) -> None:
        """Nothing."""


async def _no_workers() -> tuple[WorkerRecord, ...]:
    return ()


async def test_traffic_is_only_looked_at_when_its_time_has_come() -> None:
    """Between, an observation has loads alone."""
    prometheus = Told()
    observer = Observer(prometheus, TrafficQueries(), _no_workers, 30, lambda: 77.0)
    between = await observer.observe({Role.DECODE: Pool(1, 1)}, None)
    assert (between.at_s, between.traffic, between.missing) == (77.0, None, ())
    assert not [expression for expression in prometheus.asked if "increase" in expression]
    at_its_time = await observer.observe({}, 60.0)
    assert at_its_time.traffic is not None


async def test_a_lost_prometheus_leaves_an_observation_with_sentences() -> None:
    """Nothing is raised."""
    seen = await Observer(Told("gone"), TrafficQueries(), _no_workers, 30, lambda: 1.0).observe({Role.DECODE: Pool(2, 2)}, 60.0)
    assert seen.pools == {Role.DECODE: Pool(2, 2)}
    assert seen.missing == ("gone", "no worker's load is known: gone")
    without = await Observer(Told(), TrafficQueries(), None, 30, lambda: 1.0).observe({}, None)
    assert without.missing == ("no worker's load is known without TANDEM_DISCOVERY",)


@asynccontextmanager
async def serving(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """An HTTP server in Prometheus' place."""
    app = web.Application()
    app.router.add_post("/api/v1/query", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (400, '{"status":"error","errorType":"bad_data","error":"parse error"}', "refuses 'up': parse error"),
        (200, '{"status":"success","data":{"resultType":"matrix","result":[]}}', "matrix, not a vector"),
        (200, "<html>a proxy</html>", "what answers in Prometheus' place is none"),
        (200, '{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"x"]}]}}', "is none"),
    ],
)
async def test_answers_that_are_none_are_refused(status: int, body: str, sentence: str) -> None:
    """Never guessed at."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    async with serving(answer) as url:
        prometheus = Prometheus(url, 5)
        with pytest.raises(UnavailableError, match=sentence):
            await prometheus.query("up")
        await prometheus.close()


async def test_nan_is_handed_on_as_nan() -> None:
    """Whether it matters is the reader's to say."""

    async def answer(request: web.Request) -> web.Response:
        assert (await request.post())["query"] == "a / b"
        sample = {"metric": {"le": "1"}, "value": [1.5, "NaN"]}
        return web.Response(body=msgspec.json.encode({"status": "success", "data": {"resultType": "vector", "result": [sample]}}))

    async with serving(answer) as url:
        prometheus = Prometheus(url, 5)
        (found,) = await prometheus.query("a / b")
        assert found.labels == {"le": "1"}
        assert math.isnan(found.value)
        await prometheus.close()


async def test_a_prometheus_that_hangs_is_given_up() -> None:
    """After its deadline."""
    never = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        await never.wait()
        raise AssertionError

    async with serving(answer) as url:
        prometheus = Prometheus(url, 0.2)
        with pytest.raises(UnavailableError, match=r"within 0\.2 s"):
            await prometheus.query("up")
        await prometheus.close()
        never.set()


def test_every_expression_stands_in_one_module() -> None:
    """The worker's, too: the names that vLLM gives."""
    assert "vllm:kv_cache_usage_perc" in queries.KV_USE
    assert "vllm:num_requests_waiting" in queries.WAITING
