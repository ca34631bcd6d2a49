# SPDX-License-Identifier: Apache-2.0
"""Pipelines of several stages, pictures as inputs and sound: a real tritonserver with a real AsyncOmni on a CPU (TANDEM_OMNI_ENV).

A tiny random Llama whose text a tiny Stable Diffusion paints, or a voice speaks that has a tone for every token (tests/omni_cpu).
"""

import asyncio
import base64
import io
import json
import wave
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image
from tritonclient.utils import InferenceServerException

from calls import Call, Response, collect, connect, responses
from omni_models import SIZE, SPEECH, STORY, WORDS, make_redrawing, make_speech, make_story
from omni_rig import environment_with_platform, omni_environment
from omni_running import Running, freed, serving
from vision_models import make_image

pytestmark = pytest.mark.slow

SPOKEN_HZ, SAMPLES_PER_TOKEN = 8000, 80
"""As tests/omni_cpu/vocoder.py has them."""
DRAWN = base64.b64encode(make_image(1, 64, 64))
LONG = {"stages": {"painter": {"num_inference_steps": 150, "height": 64, "width": 64}}}


@dataclass(frozen=True)
class OmniCall(Call):
    """A call of the model `omni`."""

    model: str = "omni"
    prompt: str | list[int] | None = "A story of"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vllm-omni's, with the CPU platform of the tests."""
    return environment_with_platform(omni_environment(), tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def story(environment: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Running]:
    """A text, then a picture of it."""
    folder = tmp_path_factory.mktemp("story")
    with serving(environment, folder, deployed(folder, make_story(environment, folder, tiny_model), STORY)) as running:
        yield running


@pytest.fixture(scope="module")
def speech(environment: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Running]:
    """A text, and the sound of it while it grows."""
    folder = tmp_path_factory.mktemp("speech")
    with serving(environment, folder, deployed(folder, make_speech(folder, tiny_model), SPEECH)) as running:
        yield running


@pytest.fixture(scope="module")
def redrawing(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A picture from a picture; `localhost` may be asked for some."""
    folder = tmp_path_factory.mktemp("redrawing")
    arguments = {"model": str(make_redrawing(environment, folder)), "diffusion_load_format": "diffusers"}
    hosts = {"TANDEM_IMAGE_HOSTS": "localhost", "TANDEM_IMAGE_ALLOW_PRIVATE": "1"}
    with serving(environment, folder, arguments, **hosts) as running:
        yield running


def deployed(folder: Path, model: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The deploy configuration by a path that is relative to the model's version folder."""
    (folder / "deploy.yaml").write_text(json.dumps(config))  # JSON is YAML
    return {"model": str(model), "deploy_config": "../../../deploy.yaml"}


async def whole(running: Running, **given: Any) -> Response:
    """The one response of a request that doesn't stream."""
    async with connect(running.server.grpc_url) as client:
        [response] = await collect(client, OmniCall(stream=False, exclude_input_in_output=True, **given))
    return response


async def streamed(running: Running, **given: Any) -> list[Response]:
    """All responses of one that does."""
    async with connect(running.server.grpc_url) as client:
        return await collect(client, OmniCall(**given))


def picture(response: Response) -> Any:
    """The pixels of its only one."""
    [file] = response["image_output"]
    return np.asarray(Image.open(io.BytesIO(file)))


def played(response: Response) -> tuple[int, Any]:
    """(Hz, samples) of its only sound."""
    [file] = response["audio_output"]
    with wave.open(io.BytesIO(file)) as read:
        assert (read.getnchannels(), read.getsampwidth()) == (1, 2)
        return read.getframerate(), np.frombuffer(read.readframes(read.getnframes()), "<i2") / 32767


async def test_the_text_streams_and_then_its_picture_comes(story: Running) -> None:
    """Without streaming both are in one response; the text's end, its tokens and the prompt's are told with either."""
    returns = ("finish_reason", "num_input_tokens", "num_output_tokens")
    got = await streamed(story, returns=returns)
    one = await whole(story, returns=returns)
    assert [response["modality"] for response in got] == [["text"]] * WORDS + [["image"]]
    assert "".join(response["text_output"][0] for response in got) == one["text_output"][0] != ""
    assert sum(response["num_output_tokens"][0] for response in got) == WORDS == one["num_output_tokens"][0]
    assert got[-1]["finish_reason"] == one["finish_reason"] == ["length"]
    assert got[-1]["num_input_tokens"] == one["num_input_tokens"] == [3]
    assert one["modality"] == ["text", "image"]
    assert np.array_equal(picture(one), picture(got[-1]))


async def test_the_deploy_configuration_sets_defaults_that_a_request_overrides(story: Running) -> None:
    """Of each stage: how long the text is, how large the picture."""
    assert picture(await whole(story)).shape == (SIZE, SIZE, 3)
    asked = {"max_tokens": 9, "height": 64, "stages": {"painter": {"width": 48}}}
    got = await whole(story, sampling=asked, returns=("num_output_tokens",))
    assert (got["num_output_tokens"], picture(got).shape) == ([9], (64, 48, 3))
    with pytest.raises(InferenceServerException, match=str(STORY["stages"][0]["max_model_len"])):
        await whole(story, prompt=[5] * 600)


@pytest.mark.parametrize("stages", [{"0": {"max_tokens": 3}, "1": {"num_inference_steps": 3}},
                                    {"thinker": {"max_tokens": 3}, "painter": {"num_inference_steps": 3}}])
async def test_parameters_reach_the_stage_that_they_are_for(story: Running, stages: dict[str, Any]) -> None:
    """By its id or its name."""
    usual, got = await whole(story), await whole(story, sampling={"stages": stages}, returns=("num_output_tokens",))
    assert got["num_output_tokens"] == [3]
    assert usual["text_output"][0].startswith(got["text_output"][0])
    text_alone = await whole(story, sampling={"max_tokens": 3})
    assert not np.array_equal(picture(got), picture(text_alone))


async def test_the_same_seed_makes_the_same_picture_of_the_same_text(story: Running) -> None:
    """Another seed another, and another text, too: the painter reads what the thinker wrote."""
    by_seed = [picture(await whole(story, sampling={"stages": {"painter": {"seed": seed}}})) for seed in (5, 5, 6)]
    assert np.array_equal(by_seed[0], by_seed[1])
    assert not np.array_equal(by_seed[0], by_seed[2])
    other = await whole(story, prompt="Rain and", sampling={"stages": {"painter": {"seed": 5}}})
    assert not np.array_equal(by_seed[0], picture(other))


async def test_what_a_picture_shall_not_show_reaches_the_painter(story: Running) -> None:
    """And leaves the text as it is. Without guidance nothing is held against it."""
    guided = {"guidance_scale": 5}
    usual, got = await whole(story, sampling=guided), await whole(story, sampling=guided, negative_prompt="rain")
    assert got["text_output"] == usual["text_output"]
    assert not np.array_equal(picture(got), picture(usual))


async def test_requests_at_once_keep_to_their_own_stages_outputs(story: Running) -> None:
    """Each gets its own text and the picture of it."""
    prompts = ("A story of", "Rain and", "Nobody", "The last")
    alone = [await whole(story, prompt=prompt) for prompt in prompts]
    together = await asyncio.gather(*(whole(story, prompt=prompt) for prompt in prompts))
    assert [one["text_output"] for one in together] == [one["text_output"] for one in alone]
    for one, same in zip(together, alone, strict=True):
        assert np.array_equal(picture(one), picture(same))


@pytest.mark.parametrize("wanted", ["text", "image"])
async def test_only_what_is_wanted_comes(story: Running, wanted: str) -> None:
    """A picture alone is that of the text all the same; a text alone isn't painted."""
    both, one, got = await whole(story), await whole(story, modalities=(wanted,)), await streamed(story, modalities=(wanted,))
    assert one["modality"] == [wanted]
    assert {name for response in got for name in response["modality"]} == {wanted}
    if wanted == "text":
        assert (one["text_output"], one["image_output"]) == (both["text_output"], [])
    else:
        assert (one["text_output"], len(got)) == ([""], 1)
        assert np.array_equal(picture(one), picture(both))


@pytest.mark.parametrize(("given", "sentence"), [
    ({"modalities": ("audio",)}, "this pipeline makes no 'audio': ask in `modalities` for text, image"),
    ({"modalities": ("text", "smell")}, "this pipeline makes no 'smell'"),
    ({"sampling": {"stages": {"painter": {"max_tokens": 3}}}}, r"stage 1 \(painter\) has no sampling parameter 'max_tokens'"),
    ({"sampling": {"stages": {"thinker": {"height": 64}}}}, r"stage 0 \(thinker\) has no sampling parameter 'height'"),
    ({"sampling": {"stages": {"2": {"seed": 1}}}}, r"stage '2', which is not there: .* stage 0 \(thinker\), stage 1 \(painter\)"),
    ({"sampling": {"num_inference_steps": 0}}, r"num_inference_steps=0 of stage 1 \(painter\) is not valid"),
    ({"images": (base64.b64encode(make_image(1)),)}, r"stage 0 \(thinker\) .* takes none: leave `image` out"),
])
async def test_a_refusal_names_the_stage(story: Running, given: dict[str, Any], sentence: str) -> None:
    """And the next request is served."""
    with pytest.raises(InferenceServerException, match=sentence):
        await streamed(story, **given)
    assert (await whole(story, modalities=("text",)))["modality"] == ["text"]


async def test_who_leaves_between_the_stages_frees_both(story: Running) -> None:
    """The text is there, the picture has begun; then texts are made at once, and pictures when the painter is done with that one."""
    async with connect(story.server.grpc_url) as client:
        leaving = responses(client, OmniCall(sampling=LONG, returns=("finish_reason",), request_id="gone"))
        async for response in leaving:
            if response["finish_reason"] == ["length"]:
                break
        await leaving.aclose()
    await freed(story)
    assert (await whole(story, modalities=("text",)))["modality"] == ["text"]
    assert (await whole(story))["modality"] == ["text", "image"]


@pytest.mark.parametrize(("changed", "sentence"), [
    ({"stagse": []}, "unknown key 'stagse' in the stage configuration: did you mean 'stages'"),
    ({"stages": [{**stage, "gpu_memory_utilization": 0.8} for stage in STORY["stages"]]}, "the stages on GPU 0 want more than its memory"),
    ({"stages": [{"stage_id": 0, "max_model_length": 9}]}, "stage 0 of the stage configuration has an unknown setting 'max_model_length'"),
])
def test_a_wrong_deploy_configuration_is_refused_before_loading(environment: Path, tmp_path: Path, changed: dict[str, Any],
                                                                sentence: str) -> None:
    """With its sentence as the model's load error."""
    arguments = deployed(tmp_path, tmp_path, {**STORY, **changed})
    with pytest.raises(AssertionError), serving(environment, tmp_path, arguments):
        pass
    log = (tmp_path / "server.log").read_text()
    assert f"| UNAVAILABLE: Internal: TritonModelException: {sentence}" in log
    assert "Initializing a V1 LLM engine" not in log


async def test_sound_comes_while_the_text_grows(speech: Running) -> None:
    """By files that together are that of the request without streaming, which has as much sound as the text has tokens."""
    got, one = await streamed(speech, sampling={"max_tokens": 24}), await whole(speech, sampling={"max_tokens": 24})
    rate, samples = played(one)
    parts = [played(response) for response in got if response["audio_output"]]
    assert one["modality"] == ["text", "audio"]
    assert (rate, len(samples)) == (SPOKEN_HZ, 24 * SAMPLES_PER_TOKEN)
    assert len(parts) > 1
    assert {of_part for of_part, _ in parts} == {rate}
    assert np.array_equal(np.concatenate([part for _, part in parts]), samples)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.02)
    kinds = [kind for response in got for kind in response["modality"]]
    assert kinds.index("audio") < len(kinds) - 1 - kinds[::-1].index("text"), "the sound waited for the whole text"


async def test_the_sound_is_that_of_the_text(speech: Running) -> None:
    """A shorter text's sound is how a longer one's begins; alone it comes without the text."""
    long = played(await whole(speech))[1]
    short = await whole(speech, sampling={"max_tokens": 2}, modalities=("audio",), returns=("finish_reason",))
    assert (short["text_output"], short["modality"]) == ([""], ["audio"])
    assert np.array_equal(played(short)[1], long[: 2 * SAMPLES_PER_TOKEN])
    silent = await streamed(speech, modalities=("text",))
    assert not any(response["audio_output"] for response in silent)


async def test_the_texts_end_is_the_requests_reason(speech: Running) -> None:
    """Not the voice's, which always just stops."""
    assert (await whole(speech, returns=("finish_reason",)))["finish_reason"] == ["length"]


async def test_a_picture_as_input_reaches_the_stage(redrawing: Running, site: str) -> None:
    """As a file or by URL; another picture makes another."""
    files = (DRAWN, DRAWN, base64.b64encode(make_image(2, 64, 64)), f"{site}/ok.png".encode())
    drawn = [picture(await whole(redrawing, **from_picture(file))) for file in files]
    assert drawn[0].shape == (64, 64, 3)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert np.array_equal(drawn[0], drawn[3])


@pytest.mark.parametrize(("file", "sentence"), [
    (b"no image", "image"),
    (b"http://169.254.169.254/latest/meta-data", "TANDEM_IMAGE_HOSTS"),
    (b"file:///etc/passwd", "TANDEM_IMAGE_ROOT"),
])
async def test_a_picture_that_may_not_be_read_is_refused(redrawing: Running, file: bytes, sentence: str) -> None:
    """By the rules of the other models."""
    with pytest.raises(InferenceServerException, match=sentence):
        await whole(redrawing, **from_picture(file))
    assert picture(await whole(redrawing, **from_picture(DRAWN))).shape == (64, 64, 3)


def from_picture(file: bytes) -> dict[str, Any]:
    """A request with a picture as its input."""
    return {"prompt": "a cat", "images": (file,), "sampling": {"num_inference_steps": 4, "strength": 0.5, "seed": 1}}


@pytest.fixture
async def site() -> AsyncIterator[str]:
    """Has one picture."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=make_image(1, 64, 64), content_type="image/png")

    app = web.Application()
    app.router.add_get("/ok.png", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "localhost", 0).start()
    yield f"http://localhost:{runner.addresses[0][1]}"
    await runner.cleanup()
