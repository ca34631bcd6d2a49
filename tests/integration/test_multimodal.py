# SPDX-License-Identifier: Apache-2.0
"""Images on real engines: aggregated, with an encode worker (E/PD), and with encode, prefill and decode workers (E/P/D).

Float32, greedy, small batches one after another: equal tokens mean equal mathematics.
"""

import asyncio
import base64
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect
from servers import Server, serve, wait_for
from vision_models import PLACEHOLDER, make_image, make_vision_model

# In the long suite for its engines' start: on one busy core two took 149 s, and all requests but those of E/P/D 12 s. The normal run has
# files, URLs and their errors (test_images), the connector over a folder (test_embeddings), the encode leg (test_router_encoding).
pytestmark = pytest.mark.slow

PROMPT = f"Once upon a time somebody looked out of the window for a very long while and wrote down what there was: {PLACEHOLDER} It shows"
RETURNS = ("output_ids", "num_cached_tokens", "num_input_tokens")
SAMPLING = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
LIMITS = ("--max-num-seqs", "8", "--max-num-batched-tokens", "512", "--max-model-len", "1024", "--dtype", "float32")
LOADED, MISSED = "tandem_embeddings_loaded_total", "tandem_embeddings_missed_total"
_SEEDS = itertools.count(100)


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and two vision blocks with random weights."""
    return make_vision_model(tmp_path_factory.mktemp("vision") / "model")


@pytest.fixture(scope="module")
def split(vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vllm, encode, their ensemble and the router; images may come from this host, and in limits that a test can reach."""
    with serve(tmp_path_factory.mktemp("run"), "--model", str(vision_model), "--mode", "agg", "--encode", "1", *LIMITS,
               TANDEM_IMAGE_ALLOW_PRIVATE="true", TANDEM_IMAGE_TIMEOUT_S="2", TANDEM_IMAGE_MAX_BYTES="300000",
               TANDEM_IMAGE_HOSTS="localhost") as running:  # fmt: skip
        yield running


@pytest.fixture
async def client(split: Server) -> AsyncIterator[Any]:
    """A gRPC client."""
    async with connect(split.grpc_url) as connected:
        yield connected


def call_with(*files: bytes, model: str = "vllm", prompt: str = PROMPT) -> Call:
    """A request for these image files."""
    return Call(model, prompt=prompt, sampling=SAMPLING, returns=RETURNS, images=tuple(map(base64.b64encode, files)))


def wait_until(server: Server, worker: str, metric: str, value: float) -> None:
    """Metrics come with the statistics of a step."""
    wait_for(lambda: server.metric(worker, metric) >= value, 10, f"{metric} is {value}")


def new_image(width: int = 112, height: int = 84) -> bytes:
    """One that no cache has seen."""
    return make_image(next(_SEEDS), width, height)


async def answer_of(client: Any, call: Call) -> tuple[list[int], int, int]:
    """Output ids, cached and prompt tokens."""
    responses = await collect(client, call)
    ids = [token for response in responses for token in response["output_ids"]]
    return ids, responses[0]["num_cached_tokens"][0], responses[0]["num_input_tokens"][0]


async def test_two_images_never_share_blocks(client: Any) -> None:
    """The same prompt with another image computes it anew and says something else; with the same image it is cached, as base64 or URL."""
    one, other = new_image(), new_image()
    first, _, length = await answer_of(client, call_with(one))
    again, cached, _ = await answer_of(client, call_with(one))
    assert again == first
    assert cached >= 32
    assert length > 32
    different, cached_of_other, _ = await answer_of(client, call_with(other))
    assert different != first
    assert cached_of_other == 0
    url = b"data:image/png;base64," + base64.b64encode(one)
    by_url, cached_by_url, _ = await answer_of(client, replace(call_with(), images=(url,)))
    assert (by_url, cached_by_url) == (first, cached)


async def test_an_encode_worker_changes_no_token(client: Any, split: Server) -> None:
    """Through ensemble and router, with one image, several, frames of a video, none; the embeddings are taken, not made again."""
    frames = [new_image(56, 56) for _ in range(4)]
    cases = [((new_image(),), PROMPT), ((new_image(84, 140), new_image()), f"{PLACEHOLDER} and {PLACEHOLDER} differ"),
             (tuple(frames), f"A video: {PLACEHOLDER * 4} What moves?"), ((), "No image at all")]
    for model in ("encode_agg", "router"):
        for files, prompt in cases:
            expected = split.metric("vllm", LOADED) + len(files)
            fresh = tuple(bytes(file) + bytes([next(_SEEDS) % 256]) for file in files)  # another file, the same pixels
            split_ids, cached, _ = await answer_of(client, call_with(*fresh, model=model, prompt=prompt))
            if files:
                assert cached == 0
                wait_until(split, "vllm", LOADED, expected)
            plain, _, _ = await answer_of(client, call_with(*files, prompt=prompt))
            assert split_ids == plain, (model, prompt)
    assert split.metric("encode", "tandem_embeddings_offered_total") >= 7


async def test_a_missing_embedding_is_encoded_by_the_consumer(client: Any, split: Server) -> None:
    """Every file of the folder spoilt or gone between encoder and consumer: the same tokens, and it is counted."""
    folder = Path(split.run_dir / str(split.http_port) / "embeddings")
    for spoil in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-40])):
        image = new_image()
        await client.infer("encode", call_with(image, model="encode").inputs())
        files = list(folder.glob("*.embedding"))  # noqa: ASYNC240 - a handful of files
        assert files
        for path in files:
            spoil(path)
        missed = split.metric("vllm", MISSED)
        ids, _, _ = await answer_of(client, call_with(image))
        wait_until(split, "vllm", MISSED, missed + 1)
        assert (await answer_of(client, call_with(image + b"x")))[0] == ids


@pytest.fixture
async def site() -> AsyncIterator[str]:
    """Images behind HTTP, some of them bad."""

    async def picture(request: web.Request) -> web.StreamResponse:
        match request.path:
            case "/ok.png":
                return web.Response(body=make_image(5), content_type="image/png")
            case "/cut.png":
                return web.Response(body=make_image(5)[:2000])
            case "/large.png":
                return web.Response(body=bytes(400_000))
            case "/text":
                return web.Response(text="no image")
            case "/slow.png":
                await asyncio.Event().wait()
        raise web.HTTPNotFound

    app = web.Application()
    app.router.add_get("/{path:.*}", picture)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "localhost", 0).start()
    yield f"http://localhost:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize(("path", "words"), [
    ("/absent.png", "HTTP 404"), ("/cut.png", "truncated"), ("/large.png", "TANDEM_IMAGE_MAX_BYTES"), ("/text", "not an image"),
    ("/slow.png", "TANDEM_IMAGE_TIMEOUT_S"),
])  # fmt: skip
async def test_a_bad_url_is_its_own_error_and_frees_everything(client: Any, split: Server, site: str, path: str, words: str) -> None:
    """On the worker, and through the ensemble and the router as well; the worker holds nothing afterwards and serves the next."""
    for model in ("vllm", "encode_agg", "router") if path == "/absent.png" else ("vllm",):
        call = replace(call_with(model=model), images=(f"{site}{path}".encode(),))
        with pytest.raises(InferenceServerException, match=words):
            await collect(client, call)
    for worker in ("vllm", "encode"):
        wait_for(lambda name=worker: split.health(name)["active"] == 0, 10, f"{worker} is idle")
    good = replace(call_with(), images=(f"{site}/ok.png".encode(),))
    assert (await answer_of(client, good))[0] == (await answer_of(client, call_with(make_image(5))))[0]


async def test_hosts_that_are_not_allowed_and_files_are_refused(client: Any, site: str) -> None:
    """Whatever they would answer."""
    for url in (site.replace("localhost", "127.0.0.1") + "/ok.png", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data"):
        with pytest.raises(InferenceServerException, match=r"TANDEM_IMAGE_(HOSTS|ROOT)"):
            await collect(client, replace(call_with(), images=(url.encode(),)))


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_encode_prefill_decode_changes_no_token(vision_model: Path, tmp_path: Path) -> None:
    """EP/D, E/P/D by ensemble and by the router say what the aggregated worker says; grids reach decode, blocks come by NIXL."""
    images = [new_image(112, 84), new_image(56, 140)]
    two = f"{PROMPT} and then {PLACEHOLDER} too"
    with serve(tmp_path / "agg", "--model", str(vision_model), "--mode", "agg", "--routers", "0", *LIMITS) as plain:
        async with connect(plain.grpc_url) as client:
            expected = [(await answer_of(client, call_with(*files, prompt=prompt)))[0]
                        for files, prompt in ((images[:1], PROMPT), (images, two))]
    with serve(tmp_path / "epd", "--model", str(vision_model), "--mode", "disagg", "--encode", "1", *LIMITS) as server:
        async with connect(server.grpc_url) as client:
            for n, model in enumerate(("disagg", "encode_disagg", "router")):
                for (files, prompt), ids in zip(((images[:1], PROMPT), (images, two)), expected, strict=True):
                    fresh = tuple(file + bytes([n]) for file in files)
                    assert (await answer_of(client, call_with(*fresh, model=model, prompt=prompt)))[0] == ids, model
        assert server.metric("prefill", LOADED) == 2 * len(images), "by ensemble and by router, each image once"
        assert server.metric("prefill", MISSED) == len(images), "EP/D: through disagg nobody encoded before it"
        assert server.metric("decode", LOADED) == 0, "whoever decodes needs no embedding"
        assert server.metric("decode", "vllm:nixl_bytes_transferred_sum") > 0
        assert server.metric("decode", "vllm:nixl_num_failed_transfers_total") == 0
        assert server.metric("decode", MISSED) == 0
