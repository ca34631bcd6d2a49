# SPDX-License-Identifier: Apache-2.0
"""A real AsyncOmni in a real tritonserver, on a CPU: a text stage, then an image stage. Its environment is named by TANDEM_OMNI_ENV."""

import asyncio
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect, responses
from omni_rig import OmniServer, environment_with_platform, make_tiny_diffusion, omni_environment, serve_omni
from servers import wait_for
from tandem_cli.serve.embedded_model import embedded_model

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0, "max_tokens": 8}
IMAGE = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 1}
FREED_WITHIN_S = 5.0


@dataclass(frozen=True)
class OmniCall(Call):
    """A call of the model `omni`."""

    model: str = "omni"
    prompt: str | list[int] | None = "The capital of France is"


@pytest.fixture(scope="module")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OmniServer]:
    """A pipeline of one text stage with SmolLM2."""
    folder = tmp_path_factory.mktemp("text")
    environment = environment_with_platform(omni_environment(), folder)
    arguments = {"model": str(embedded_model()), "dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    with serve_omni(environment, folder, arguments) as running:
        yield running


@pytest.fixture(scope="module")
def image_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OmniServer]:
    """A pipeline of one image stage of random weights."""
    folder = tmp_path_factory.mktemp("image")
    environment = environment_with_platform(omni_environment(), folder)
    model = make_tiny_diffusion(environment, folder)
    with serve_omni(environment, folder, {"model": str(model), "dtype": "float32", "diffusion_load_format": "diffusers"}) as running:
        yield running


async def test_text_streams_by_deltas(text_server: OmniServer) -> None:
    """And comes in one piece where it isn't streamed; the request's own parameters lie over the stage's defaults."""
    async with connect(text_server.grpc_url) as client:
        got = await collect(client, OmniCall(sampling=GREEDY, returns=("finish_reason", "num_output_tokens")))
        [whole] = await collect(client, OmniCall(sampling={"stages": {"thinker": GREEDY}}, stream=False, exclude_input_in_output=True))
    text = "".join(one["text_output"][0] for one in got)
    assert text.startswith(" Paris")
    assert len(got) > 1
    assert got[-1]["finish_reason"] == ["length"]
    assert sum(one["num_output_tokens"][0] for one in got) == GREEDY["max_tokens"]
    assert (whole["text_output"], whole["modality"]) == ([text], ["text"])


@pytest.mark.parametrize(("call", "sentence"), [
    (OmniCall(sampling={"temprature": 0}), "did you mean 'temperature'"),
    (OmniCall(sampling={"temperature": -1}), "temperature must be non-negative"),
    (OmniCall(modalities=("audio",)), "makes no 'audio': ask in `modalities` for text"),
])
async def test_a_wrong_request_is_told_why(text_server: OmniServer, call: OmniCall, sentence: str) -> None:
    """And the next one is served."""
    async with connect(text_server.grpc_url) as client:
        with pytest.raises(InferenceServerException, match=sentence):
            await collect(client, call)
        assert await collect(client, OmniCall(sampling=GREEDY))


async def test_a_client_that_goes_away_frees_its_request(text_server: OmniServer) -> None:
    """While another's goes on."""
    async with connect(text_server.grpc_url) as client:
        leaving = responses(client, OmniCall(sampling={"max_tokens": 200, "ignore_eos": True}, request_id="gone"))
        assert await anext(leaving)
        await leaving.aclose()
        staying = await collect(client, OmniCall(sampling=GREEDY))
        await asyncio.to_thread(wait_for, lambda: text_server.health()["active"] == 0, FREED_WITHIN_S, "the request's end")
    assert staying
    assert 'dynamo_component_errors_total{' in text_server.metrics()


async def test_health_metrics_and_discovery_know_it(text_server: OmniServer, tmp_path: Path) -> None:
    """Its role, its requests, and what vllm-omni counts itself."""
    del tmp_path
    async with connect(text_server.grpc_url) as client:
        await collect(client, OmniCall(sampling=GREEDY))
    health = text_server.health()
    assert (health["status"], health["role"], health["registration"]) == ("ready", "omni", "registered")
    metrics = text_server.metrics()
    assert "dynamo_component_requests_total{" in metrics
    assert "vllm_omni:" in metrics


async def test_images_are_made_as_asked(image_server: OmniServer) -> None:
    """Of the size that was asked for, the same for the same seed, another for another."""
    async with connect(image_server.grpc_url) as client:
        pictures = [await _picture(client, {**IMAGE, "seed": seed}) for seed in (1, 1, 2)]
    assert pictures[0].shape == (64, 64, 3)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


async def test_an_image_stage_refuses_what_it_can_not_do(image_server: OmniServer) -> None:
    """With a sentence, and serves the next."""
    async with connect(image_server.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="give at least 1"):
            await collect(client, OmniCall(sampling={**IMAGE, "num_inference_steps": 0}))
        assert (await _picture(client, IMAGE)).shape == (64, 64, 3)


async def _picture(client: Any, sampling: dict[str, Any]) -> Any:
    got = await collect(client, OmniCall(prompt="a cat", sampling=sampling, modalities=("image",)))
    [file] = [file for one in got for file in one["image_output"]]
    return np.asarray(Image.open(io.BytesIO(file)))
