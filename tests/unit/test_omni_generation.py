# SPDX-License-Identifier: Apache-2.0
"""A request on a pipeline ends exactly once, with all that was made of it, and leaves nothing in the stages."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from fakes import WAIT_S, ManualOutbox, reader
from omni_pipelines import Output, RecordingSink, ScriptedPipeline, words
from tandem_protocol.errors import EngineError, RequestCancelledError, RequestError, UnavailableError
from tandem_protocol.requests import Envelope
from tandem_protocol.streams import ResponseStream
from tandem_worker.load import EngineLoads
from tandem_worker.omni.generation import OmniGenerator
from tandem_worker.omni.pipeline import Order
from tandem_worker.omni.requests import OmniRequest, parse_omni_request

PICTURE = Image.new("RGB", (2, 2))
ANSWER = (words("Pa", 5), words("ris", 6, end="stop"), Output("image", images=[PICTURE], finished=True))


def request(**given: Any) -> OmniRequest:
    """A streamed one with these tensors more."""
    return parse_omni_request(reader({"text_input": "Say", "stream": [True], **given}), Envelope("r", {}))


async def served(pipeline: ScriptedPipeline, asked: OmniRequest) -> RecordingSink:
    """What a request's client gets."""
    sink, outbox = RecordingSink(), ManualOutbox()
    stream = ResponseStream(sink, outbox)
    push = stream.push

    def push_and_send(output: Any) -> None:
        push(output)
        outbox.send_all()

    stream.push = push_and_send  # type: ignore[method-assign]
    async with asyncio.timeout(WAIT_S):
        await OmniGenerator(pipeline, EngineLoads()).serve(asked, stream, 1)
    outbox.send_all()
    return sink


async def test_a_stream_brings_each_stages_output_as_it_comes() -> None:
    """Text by deltas, then the image, then an end without tensors."""
    pipeline = ScriptedPipeline(ANSWER)
    sink = await served(pipeline, request())
    assert [response.get("text_output") for response in sink.responses] == [[b"Pa"], [b"ris"], [b""], None]
    assert [len(response.get("image_output", [])) for response in sink.responses] == [0, 0, 1, 0]
    assert (sink.error, pipeline.closed) == (None, ["r"])


async def test_without_streaming_there_is_one_response() -> None:
    """With all of it, and the prompt before the text as it is of the other models."""
    sink = await served(ScriptedPipeline(ANSWER), request(stream=[False]))
    [response] = sink.responses
    assert (response["text_output"], len(response["image_output"])) == ([b"SayParis"], 1)
    assert response["modality"] == [b"text", b"image"]


async def test_the_pipeline_is_asked_what_the_request_says() -> None:
    """Prompt, modalities, and each stage's parameters."""
    pipeline = ScriptedPipeline(ANSWER)
    await served(pipeline, request(modalities=["image"], sampling_parameters='{"max_tokens": 4, "stages": {"painter": {"seed": 3}}}'))
    [order] = pipeline.orders
    assert (order.request_id, order.modalities, order.streamed) == ("r", ("image",), True)
    assert order.prompt == {"prompt": "Say", "modalities": ["image"]}
    assert list(order.sampling) == [{"max_tokens": 4}, {"seed": 3}]


@pytest.mark.parametrize(("script", "kind", "sentence"), [
    ((words("Pa", 5), RequestError("too long")), RequestError, "too long"),
    ((words("Pa", 5), UnavailableError("died")), UnavailableError, "died"),
    ((words("Pa", 5), Output(error="no", error_status_code=422)), RequestError, "no"),
    ((words("Pa", 5), KeyError("bug")), EngineError, "KeyError"),
    ((words("Pa", 5), words("", end="abort")), RequestCancelledError, "aborted"),
])
async def test_an_error_ends_the_stream_after_what_came_before(script: Any, kind: type[Exception], sentence: str) -> None:
    """With its own code, and closed in the pipeline."""
    pipeline = ScriptedPipeline(script)
    sink = await served(pipeline, request())
    assert [response["text_output"] for response in sink.responses] == [[b"Pa"]]
    assert isinstance(sink.error, kind)
    assert sentence in str(sink.error)
    assert pipeline.closed == ["r"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_text_that_is_only_painted_does_not_come(stream: bool) -> None:
    """The pipeline makes it all the same."""
    sink = await served(ScriptedPipeline(ANSWER), request(modalities=["image"], stream=[stream]))
    first = sink.responses[0]
    assert (first["text_output"], len(first["image_output"]), first["modality"]) == ([b""], 1, [b"image"])
    assert sink.responses[1:] == ([{}] if stream else [])


async def test_images_that_no_stage_takes_are_refused_before_they_are_fetched() -> None:
    """A diffusion stage would overlook them in silence."""
    pipeline = ScriptedPipeline(ANSWER)
    pipeline.stages = [replace(stage, takes_images=False) for stage in pipeline.stages]
    sink = await served(pipeline, request(image=[b"http://example.org/a.png"]))
    assert isinstance(sink.error, RequestError)
    assert "takes none" in str(sink.error)
    assert pipeline.orders == []


async def test_a_wrong_request_never_reaches_the_pipeline() -> None:
    """Its sentence is the answer."""
    pipeline = ScriptedPipeline(ANSWER)
    sink = await served(pipeline, request(modalities=["audio"]))
    assert isinstance(sink.error, RequestError)
    assert pipeline.orders == []


async def test_a_request_may_not_take_longer_than_it_says() -> None:
    """Then the stages forget it."""
    pipeline = ScriptedPipeline((words("Pa", 5),), endless=True)
    sink = await served(pipeline, replace(request(), timeout_s=0.01))
    assert isinstance(sink.error, UnavailableError)
    assert "timed out after its own timeout of 0.01 s" in str(sink.error)
    assert pipeline.closed == ["r"]


async def test_a_cancelled_request_is_closed_in_the_pipeline() -> None:
    """The task's end is passed on: the host answers the client."""
    pipeline = ScriptedPipeline((), endless=True)
    stream = ResponseStream(RecordingSink(), ManualOutbox())
    task = asyncio.ensure_future(OmniGenerator(pipeline, EngineLoads()).serve(request(), stream, 1))
    async with asyncio.timeout(WAIT_S):
        await pipeline.ordered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert pipeline.closed == ["r"]


async def test_a_request_counts_while_the_pipeline_has_it() -> None:
    """And every output is a beat of the pipeline's pulse: by both a hang is known."""
    loads, seen = EngineLoads(), []

    class Looking(ScriptedPipeline):
        async def generate(self, order: Order) -> AsyncGenerator[Output, None]:
            async for output in super().generate(order):
                seen.append((loads.of(0).in_engine, loads.running))
                yield output

    sink, outbox = RecordingSink(), ManualOutbox()
    await OmniGenerator(Looking(ANSWER), loads).serve(request(), ResponseStream(sink, outbox), 1)
    assert seen == [(1, 1)] * len(ANSWER)
    assert (loads.of(0).in_engine, loads.running, loads.of(0).steps) == (0, 0, len(ANSWER))
