# SPDX-License-Identifier: Apache-2.0
"""Runs one request on a pipeline: it ends exactly once, and no stage keeps anything of it. On the worker's event loop."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from tandem_protocol.errors import EngineError, RequestCancelledError, TandemError, UnavailableError
from tandem_protocol.streams import ResponseStream
from tandem_worker.images.reader import ImageReader
from tandem_worker.load import EngineLoads
from tandem_worker.omni.bounds import check_bounds
from tandem_worker.omni.config import OmniSettings
from tandem_worker.omni.outputs import AnswerReader, OmniAnswer, OmniEncoder, StageOutput
from tandem_worker.omni.pipeline import Order, Pipeline
from tandem_worker.omni.requests import OmniRequest, omni_prompt
from tandem_worker.omni.terms import check_images, sampling_by_stage, wanted_modalities

log = logging.getLogger(__name__)

_ABORTED = "abort"


@dataclass(frozen=True)
class OmniGenerator:
    """Serves requests on one pipeline."""

    engine: Pipeline
    loads: EngineLoads
    """Those of the whole pipeline, as if it were one engine: requests in it, and its pulse, which is steps of its stages and outputs."""
    images: ImageReader = field(default_factory=ImageReader)
    bounds: OmniSettings = field(default_factory=OmniSettings)

    async def serve(self, request: OmniRequest, stream: ResponseStream, active: int) -> None:
        """Runs one request to its end and ends its stream, also on errors; only cancellation is passed on."""
        del active
        stream.encode = OmniEncoder(request).encode
        try:
            async with asyncio.timeout(request.timeout_s):
                await self._run(request, stream)
        except TimeoutError:
            stream.fail(UnavailableError(f"request timed out after its own timeout of {request.timeout_s} s"))
        except asyncio.CancelledError:
            raise
        except TandemError as exc:
            stream.fail(exc)
        except Exception as exc:  # the root of the task: an uncaught error would leave the client waiting for ever
            log.exception("request.failed")
            stream.fail(EngineError(f"the pipeline failed on this request: {type(exc).__name__}: {exc}"))

    async def _run(self, request: OmniRequest, stream: ResponseStream) -> None:
        order = await self._order(request)
        reader, collected = AnswerReader(order.modalities), OmniAnswer()
        async with aclosing(self._outputs(order)) as outputs:
            async for output in outputs:
                _refuse_aborted(output)
                answer = reader.read(output)
                if request.stream and (answer.modalities or answer.finish_reason):
                    stream.push(answer)
                else:
                    collected.add(answer)
        collected.finished = True
        stream.push(collected)

    async def canary(self, order: Order) -> None:
        """Generates for nobody. Raises what it raises."""
        async with aclosing(self._outputs(order)) as outputs:
            async for _ in outputs:
                pass

    async def _outputs(self, order: Order) -> AsyncGenerator[StageOutput, None]:
        load = self.loads.of(0)
        load.in_engine = load.running = load.in_engine + 1
        try:
            async with aclosing(self.engine.generate(order)) as outputs:
                async for output in outputs:
                    load.steps += 1
                    yield output
        finally:
            load.in_engine = load.running = load.in_engine - 1

    async def _order(self, request: OmniRequest) -> Order:
        stages = self.engine.stages
        modalities = wanted_modalities(request.modalities, stages)
        sampling = sampling_by_stage(request.sampling, stages)
        check_bounds(sampling, stages, self.bounds)
        check_images(len(request.images), stages)
        images = await self.images.read(request.images) if request.images else ()
        prompt = omni_prompt(request, [image.pixels for image in images], modalities)
        return Order(request.request_id, prompt, sampling, modalities, request.stream)


def _refuse_aborted(output: StageOutput) -> None:
    """Who aborts a request by its id past us must not leave a client with half an answer that looks whole."""
    if any(getattr(one, "finish_reason", None) == _ABORTED for one in output.outputs):
        raise RequestCancelledError("the pipeline aborted this request")
