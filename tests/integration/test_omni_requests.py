# SPDX-License-Identifier: Apache-2.0
"""Requests to an omni worker that end otherwise than well, and what is told of all: a real tritonserver with a real AsyncOmni on a CPU.

Each of the two servers is shared by its tests, whose last ends or drains it. Their environment is named by TANDEM_OMNI_ENV.
"""

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect
from expositions import Exposition
from omni_rig import environment_with_platform, make_tiny_diffusion, omni_environment
from omni_running import CLIENT_S, ENDLESS, FREED_WITHIN_S, Running, errors, freed, serving, streaming, text, until
from servers import get_text, post_json, tandem
from spans import Collector
from tandem_protocol import workers

pytestmark = pytest.mark.slow

SHORT = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
IMAGE = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 1}
LONG_IMAGE = {**IMAGE, "num_inference_steps": 100}
HELD = 3
"""Requests that the text server holds at most."""
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vllm-omni's, with the CPU platform of the tests."""
    return environment_with_platform(omni_environment(), tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Takes spans until the end."""
    with Collector() as taking:
        yield taking


@pytest.fixture(scope="module")
def texts(environment: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, collector: Collector) -> Iterator[Running]:
    """A text stage that holds few requests; its last test ends it."""
    traced = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.url,
              "OTEL_BSP_SCHEDULE_DELAY": "500"}
    settings = {"TANDEM_MAX_QUEUED_REQUESTS": str(HELD), "TANDEM_TRITON_METRICS_INTERVAL_S": "0.5", "DYN_LOG": "info,tandem_worker=debug"}
    with serving(environment, tmp_path_factory.mktemp("texts"), text(tiny_model), **traced, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def pictures(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An image stage; its last test drains it."""
    folder = tmp_path_factory.mktemp("pictures")
    model = make_tiny_diffusion(environment, folder)
    with serving(environment, folder, {"model": str(model), "diffusion_load_format": "diffusers"}) as running:
        yield running


async def test_a_deadline_ends_a_request(texts: Running) -> None:
    """Triton's own timeout, after the tokens before it."""
    async with streaming(texts.server.grpc_url, 1, timeout_us=1_500_000) as [task]:
        with pytest.raises(InferenceServerException, match=r"timed out after its own timeout of 1\.5 s"):
            await asyncio.wait_for(task, CLIENT_S)
        await freed(texts)


async def test_an_abort_by_id_ends_one_of_several(texts: Running) -> None:
    """On the admin port; the other goes on."""
    async with streaming(texts.server.grpc_url, 1) as [staying], streaming(texts.server.grpc_url, 1, request_id="mine") as [mine]:
        assert post_json(f"{texts.server.admin_url}/engine/abort", {"request_id": "mine"}) == {"aborted": 1}
        with pytest.raises(InferenceServerException, match="aborted"):
            await asyncio.wait_for(mine, CLIENT_S)
        await until(lambda: texts.server.health()["active"] == 1, FREED_WITHIN_S, "one request left")
        assert not staying.done()
    await freed(texts)


async def test_a_client_that_leaves_frees_the_stage(texts: Running) -> None:
    """And the next is served as before."""
    async with streaming(texts.server.grpc_url, 2):
        pass
    await freed(texts)
    async with connect(texts.server.grpc_url) as client:
        assert await collect(client, Call("omni", sampling=SHORT))


async def test_beyond_its_bound_it_refuses(texts: Running) -> None:
    """With UNAVAILABLE, so that clients try elsewhere; those that it holds go on."""
    async with streaming(texts.server.grpc_url, HELD) as tasks, connect(texts.server.grpc_url) as client:
        before = errors(texts, "unavailable")
        with pytest.raises(InferenceServerException, match=f"already holds {HELD} requests"):
            await collect(client, Call("omni", sampling=SHORT))
        assert errors(texts, "unavailable") == before + 1
        assert not any(task.done() for task in tasks)
    await freed(texts)


@pytest.mark.parametrize(("call", "sentence"), [
    (Call("omni", prompt=[5] * 5000, sampling=SHORT), "4096"),
    (Call("omni", prompt=[9_999_999], sampling=SHORT), "vocab"),
], ids=["too-long", "no-token"])
async def test_what_a_stage_refuses_disturbs_no_other(texts: Running, call: Call, sentence: str) -> None:
    """It is the client's error, told in a sentence."""
    async with streaming(texts.server.grpc_url, 1) as [staying], connect(texts.server.grpc_url) as client:
        with pytest.raises(InferenceServerException, match=sentence):
            await collect(client, call)
        assert not staying.done()
        assert texts.server.health()["status"] == "ready"
    await freed(texts)


async def test_metrics_count_what_was_asked(texts: Running) -> None:
    """Requests by their outcome and tokens, on the admin port by us, vLLM and vllm-omni, and ours on Triton's port, too."""
    before = texts.metrics
    async with connect(texts.server.grpc_url) as client:
        for _ in range(3):
            got = await collect(client, Call("omni", sampling=SHORT, returns=("num_input_tokens", "num_output_tokens")))
            assert sum(one["num_output_tokens"][0] for one in got) == SHORT["max_tokens"]
        with pytest.raises(InferenceServerException):
            await collect(client, Call("omni", sampling={"temprature": 1}))
    await freed(texts)
    after = texts.metrics

    def more(name: str, *parts: str) -> float:
        return after.sum_of(name, *parts) - before.sum_of(name, *parts)

    assert more("dynamo_component_requests_total") == 4
    assert more("dynamo_component_errors_total", 'error_type="invalid_argument"') == 1
    assert more("tandem_worker_time_to_first_token_seconds_count") == 3
    assert more("vllm:request_success_total") == 3
    assert more("vllm:generation_tokens_total") == 3 * SHORT["max_tokens"] == more("vllm_omni:generation_tokens_total")
    assert more("vllm_omni:requests_success_total") == 3
    assert after.doubles == []
    assert all('dynamo_component="backend"' in series for series in after.samples if series.startswith("vllm_omni:"))
    requests = after.sum_of("dynamo_component_requests_total")
    port = int(texts.server.grpc_url.rpartition(":")[2]) + 1

    def on_tritons_port() -> bool:
        return Exposition(get_text(f"http://127.0.0.1:{port}/metrics")).sum_of("dynamo_component_requests_total") == requests

    await until(on_tritons_port, FREED_WITHIN_S, "the same figure on Triton's port")


def test_the_command_line_shows_it(texts: Running) -> None:
    """As any worker, with its role and health."""
    admin = texts.server.admin_url.rpartition(":")[2]
    shown = tandem(texts.folder, "status", "--url", texts.server.grpc_url, "--admin-port", admin, "--json", timeout_s=CLIENT_S)
    [model] = json.loads(shown.stdout)["models"]
    assert (model["model"], model["role"], model["serves"]) == ("omni", "omni", True), shown.stderr


async def test_a_request_is_traced(texts: Running, collector: Collector) -> None:
    """Its span lies under the client's, and its log lines have its id."""
    async with connect(texts.server.grpc_url) as client:
        await collect(client, Call("omni", sampling=SHORT, request_id="followed", parameters={"traceparent": PARENT}))
    await until(lambda: TRACE_ID in collector.trace_ids, CLIENT_S, "the span")
    assert [span.name for span in collector.spans if span.trace_id.hex() == TRACE_ID] == ["worker.request"]
    about = [line for line in texts.server.log.splitlines() if "request_id=followed" in line]
    assert any("request.ended outcome=ok" in line and f"trace_id={TRACE_ID}" in line for line in about)


async def test_sigterm_lets_running_requests_end(texts: Running) -> None:
    """Then the worker leaves discovery, the server ends with 0, and nothing is left of it. All that it logged could be written."""
    async with streaming(texts.server.grpc_url, 2, sampling={**ENDLESS, "max_tokens": 400}) as tasks:
        traces = texts.traces()
        assert not any(task.done() for task in tasks)
        texts.server.process.send_signal(signal.SIGTERM)
        assert [await asyncio.wait_for(task, CLIENT_S) for task in tasks] == [400, 400]
    await traces.vanish()
    assert texts.server.process.returncode == 0
    assert await texts.states() == []
    assert "Logging error" not in texts.server.log
    assert "Segfault" not in texts.server.log


async def test_an_image_that_fails_disturbs_no_other(pictures: Running) -> None:
    """What only the stage can know ends that request alone."""
    async with connect(pictures.server.grpc_url) as client:
        good = [asyncio.create_task(collect(client, Call("omni", "a cat", IMAGE))) for _ in range(2)]
        before = errors(pictures, "internal")
        with pytest.raises(InferenceServerException, match=r"the pipeline failed on this request: .* divisible by 8"):
            await collect(client, Call("omni", "a cat", {**IMAGE, "height": 60, "width": 60}))
        assert errors(pictures, "internal") == before + 1
        for one in good:
            assert len((await one)[0]["image_output"]) == 1
    assert pictures.server.health()["status"] == "ready"


@pytest.mark.parametrize(("more", "bound"), [
    ({"num_inference_steps": 1001}, "TANDEM_OMNI_MAX_STEPS"), ({"height": 2**21}, "TANDEM_OMNI_MAX_PIXELS"),
])
async def test_what_no_stage_could_bear_reaches_none(pictures: Running, more: dict[str, int], bound: str) -> None:
    """It would be computed for minutes, or take the worker's memory."""
    async with connect(pictures.server.grpc_url) as client:
        with pytest.raises(InferenceServerException, match=bound):
            await collect(client, Call("omni", "a cat", {**IMAGE, **more}))
    assert pictures.server.health()["active"] == 0


async def test_images_are_counted(pictures: Running) -> None:
    """As many as were made."""
    before = pictures.metrics
    async with connect(pictures.server.grpc_url) as client:
        for _ in range(2):
            await collect(client, Call("omni", "a cat", {**IMAGE, "num_outputs_per_prompt": 1}))
    await freed(pictures)
    after = pictures.metrics
    assert after.sum_of("vllm_omni:image_count_total") - before.sum_of("vllm_omni:image_count_total") == 2
    assert after.sum_of("dynamo_component_requests_total") - before.sum_of("dynamo_component_requests_total") == 2
    assert after.sum_of("dynamo_component_response_bytes_total") > before.sum_of("dynamo_component_response_bytes_total")


def test_grafanas_board_asks_for_metrics_that_are_there(pictures: Running) -> None:
    """Also those of kinds of output that this pipeline doesn't make."""
    board = json.loads((Path(__file__).parents[2] / "dashboards" / "omni.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:vllm_omni:|dynamo_component_)\w+", query)}
    told = set(re.findall(r"^# TYPE (\S+)", pictures.server.metrics(), re.MULTILINE))
    assert len(asked) > 15
    assert {name for name in asked if name not in told and re.sub("_(bucket|sum|count)$", "", name) not in told} == set()


async def test_an_image_that_nobody_wants_any_more(pictures: Running) -> None:
    """Its client is told at once, and the worker is free. The stage goes on to its end (docs/omni.md), and the next image is right."""
    async with connect(pictures.server.grpc_url) as client:
        leaving = asyncio.create_task(collect(client, Call("omni", "a cat", LONG_IMAGE, request_id="unwanted")))
        await until(lambda: pictures.server.health()["active"] == 1, CLIENT_S, "a running image")
        assert post_json(f"{pictures.server.admin_url}/engine/abort", {"request_id": "unwanted"}) == {"aborted": 1}
        with pytest.raises(InferenceServerException, match="aborted"):
            await asyncio.wait_for(leaving, FREED_WITHIN_S)
        await freed(pictures)
        after, again = [await collect(client, Call("omni", "a cat", IMAGE)) for _ in range(2)]
        assert after[0]["image_output"] == again[0]["image_output"]


async def test_a_drained_worker_takes_nothing_more(pictures: Running) -> None:
    """What runs ends well; discovery says it before."""
    async with connect(pictures.server.grpc_url) as client:
        running = asyncio.create_task(collect(client, Call("omni", "a cat", LONG_IMAGE)))
        await until(lambda: pictures.server.health()["active"] == 1, CLIENT_S, "a running image")
        draining = asyncio.create_task(asyncio.to_thread(post_json, f"{pictures.server.admin_url}/engine/drain", {"timeout_s": 60}))
        await until(lambda: pictures.server.health()["status"] == "draining", FREED_WITHIN_S, "draining")
        with pytest.raises(InferenceServerException, match="draining"):
            await collect(client, Call("omni", "a cat", IMAGE))
        assert await pictures.states() == [workers.WorkerState.DRAINING]
        assert len((await running)[0]["image_output"]) == 1
        assert await draining == {"aborted": 0}
