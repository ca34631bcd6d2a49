# SPDX-License-Identifier: Apache-2.0
"""Runs one request on the engine, in the worker's role. Edge module: calls vLLM; runs on the event loop.

What holds for every request, whatever happens to it:
- its stream ends exactly once, with a final response or with one error, after the tokens before it;
- the engine keeps nothing of it: a request that was accepted is finished or aborted, and a handoff that was never
  accepted is given back to the prefill worker, which otherwise holds the blocks until their lease of 30 s ends.
"""

import asyncio
import functools
import logging
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tandem_protocol import handoff
from tandem_protocol.errors import EngineError, RequestError, TandemError, UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.roles import Role
from tandem_protocol.streams import ResponseStream
from tandem_worker.config import WorkerSettings
from tandem_worker.encode.answer import NothingEncoded, encode_answer, encode_params
from tandem_worker.images.decode import ReadImage
from tandem_worker.images.reader import ImageReader
from tandem_worker.load import EngineLoads
from tandem_worker.lora.adapters import Adapters
from tandem_worker.lora.vllm_loras import lora_request
from tandem_worker.pacing import stream_interval
from tandem_worker.pairing import is_paired
from tandem_worker.responses import GenerationEncoder, encode_handoff
from tandem_worker.returning import HandoffReturns
from tandem_worker.sampling import Sampling, generation_params, handoff_params, parse_sampling, prefill_params
from tandem_worker.speculation import speculation_of

log = logging.getLogger(__name__)

DEFAULT_PRIORITY = 100
"""vLLM schedules lower numbers first: a request with priority 1 goes before ordinary ones, one with 200 after them."""
_RELEASE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Generator:
    """Serves requests on one engine."""

    engine: AsyncLLM
    settings: WorkerSettings
    loads: EngineLoads
    adapters: Adapters
    images: ImageReader = field(default_factory=ImageReader)

    async def serve(self, request: GenerationRequest, stream: ResponseStream, active: int) -> None:
        """Runs one request to its end and ends its stream, also on errors; only cancellation is passed on."""
        leg = _Leg(self, request)
        try:
            async with asyncio.timeout(request.timeout_s):
                await self._run(leg, stream, active)
        except TimeoutError:
            stream.fail(UnavailableError(f"request timed out after its own timeout of {request.timeout_s} s"))
        except EngineDeadError:
            stream.fail(UnavailableError("the engine of this worker died: retry on another worker or after its restart"))
        except asyncio.CancelledError:
            raise
        except Exception as exc:  # the root of the task: an uncaught error would leave the client waiting for ever
            stream.fail(_translate(exc, dead=self.engine.errored))
        finally:
            await leg.release()

    @functools.cached_property
    def returns(self) -> HandoffReturns:
        """One for all requests of the engine."""
        return HandoffReturns(self.engine, self.loads)

    async def canary(self, request: GenerationRequest) -> None:
        """Generates for nobody, on every rank of this engine: whatever the role, nothing is handed off or pulled. Raises what it raises."""
        canaries = [asyncio.ensure_future(self._canary(request, rank)) for rank in self.loads.by_rank]
        try:
            await asyncio.gather(*canaries)
        finally:
            for canary in canaries:
                canary.cancel()

    async def _canary(self, request: GenerationRequest, rank: int) -> None:
        params = self._generation_params(parse_sampling(request.sampling), request, 1)
        leg = _Leg(self, request)
        leg.rank = rank
        await leg.run(self._prompt(request, ()), params, None, DEFAULT_PRIORITY, None)

    @property
    def bos(self) -> int | None:
        """The model's own first token, if it has one."""
        token = getattr(self.engine.model_config.hf_text_config, "bos_token_id", None)
        return int(token) if isinstance(token, int) else None

    @property
    def speculation(self) -> str:
        """How the engine speculates; empty if it doesn't."""
        return speculation_of(self.engine.vllm_config.speculative_config)

    async def _run(self, leg: "_Leg", stream: ResponseStream, active: int) -> None:
        sampling = parse_sampling(leg.request.sampling)
        # Encoders have no adapters: what an adapter changes comes after the embeddings.
        name = None if self.settings.effective_role is Role.ENCODE else sampling.lora_name
        async with self.adapters.using(name) as adapter:
            await self._run_with(adapter and lora_request(adapter), sampling, leg, stream, active)

    async def _run_with(self, lora: LoRARequest | None, sampling: Sampling, leg: "_Leg", stream: ResponseStream, active: int) -> None:
        request = leg.request
        leg.rank = sampling.data_parallel_rank
        images = await self._read_images(request)
        prompt = self._prompt(request, images)
        priority = request.priority or sampling.priority or DEFAULT_PRIORITY
        interval = stream_interval(active, self.loads.step_s, self.settings.response_rate) if request.stream else 1
        params = self._generation_params(sampling, request, interval)
        if self.settings.effective_role is Role.ENCODE:
            stream.encode = functools.partial(encode_answer, image_ids=_ids_of(images))
            params = encode_params()
            if not images:
                stream.push(NothingEncoded())
                return
        elif self.settings.effective_role is Role.PREFILL:
            stream.encode = functools.partial(encode_handoff, speculation=self.speculation, image_ids=_ids_of(images))
            params = prefill_params(sampling)
        else:
            stream.encode = GenerationEncoder(request, sampling.n).encode
        if request.handoff is not None and not is_paired(request.handoff, self.speculation):
            await leg.release()
        elif request.handoff is not None:
            await self._refuse_if_cancelled(stream)
            if sampling.n > 1:
                # Each sequence would pull, and the first to finish would free the blocks under the others. So pull once,
                # into the prefix cache, and let all sequences find the prompt there.
                await leg.run(prompt, handoff_params(sampling, request.handoff), lora, priority, None)
            else:
                params.extra_args = {"kv_transfer_params": sampling.transfer_params(request.handoff)}
        await leg.run(prompt, params, lora, priority, stream)

    async def _refuse_if_cancelled(self, stream: ResponseStream) -> None:
        """An ensemble starts decode even if the client went away during prefill; then the blocks are not worth pulling."""
        if await asyncio.to_thread(stream.sink.is_cancelled):
            raise asyncio.CancelledError

    def _generation_params(self, sampling: Sampling, request: GenerationRequest, interval: int) -> SamplingParams:
        return generation_params(sampling, stream=request.stream, detokenize=self.settings.use_vllm_tokenizer, stream_interval=interval)

    async def _read_images(self, request: GenerationRequest) -> tuple[ReadImage, ...]:
        """The images, which of a decode leg must be those that its prompt was computed with: a URL may show another one by now."""
        if not request.images:
            return ()
        if not self.engine.model_config.is_multimodal_model:
            raise RequestError("this model takes no images: leave the tensor image out")
        images = await self.images.read(request.images)
        if request.handoff is not None:
            handoff.check_images(request.handoff, _ids_of(images))
        return images

    def _prompt(self, request: GenerationRequest, images: tuple[ReadImage, ...]) -> TextPrompt | TokensPrompt:
        prompt: Any
        if isinstance(request.prompt, str):
            if not self.settings.use_vllm_tokenizer:
                raise RequestError("this worker takes token ids only (DYN_VLLM_USE_TOKENIZER is off): send input_ids")
            prompt = TextPrompt(prompt=request.prompt)
        else:
            prompt = TokensPrompt(prompt_token_ids=request.prompt)
        if images:
            prompt["multi_modal_data"] = {"image": [image.pixels for image in images]}
            # Block hashes, caches of the processor and embeddings go by these ids, and so do the router's block keys.
            prompt["multi_modal_uuids"] = {"image": list(_ids_of(images))}
        return prompt


class _Leg:
    """One request's time on the engine; knows whether its handoff still has to be given back."""

    def __init__(self, generator: Generator, request: GenerationRequest) -> None:
        self.request = request
        self._engine = generator.engine
        self._loads = generator.loads
        self._returns = generator.returns
        self._unclaimed = request.handoff
        self.rank: int | None = None
        """Data-parallel rank that serves it; chosen by the first run unless the request names one."""
        traced = generator.engine.vllm_config.observability_config.otlp_traces_endpoint is not None
        self._trace = (request.trace or None) if traced else None  # vLLM warns about headers that it has no use for

    async def run(self, prompt: Any, params: SamplingParams, lora: LoRARequest | None, priority: int,
                  stream: ResponseStream | None) -> None:
        """Submits and pushes every output to `stream` (None: drops them). Aborts on the engine when cancelled.

        Raises RequestError for a rank that this worker doesn't serve.
        """
        self.rank, place = self._loads.choose(self.rank)
        load = self._loads.of(self.rank)
        load.in_engine += 1  # before the first wait, so that a burst spreads over the ranks
        try:
            await self._follow(await self._add(prompt, params, lora, priority, place), stream)
        finally:
            load.in_engine -= 1

    async def _add(self, prompt: Any, params: SamplingParams, lora: LoRARequest | None, priority: int, place: int) -> Any:
        """Hands the request to the engine; `place`: that of the rank among those of this host, by which vLLM counts."""
        adding = asyncio.ensure_future(
            self._engine.add_request(self.request.request_id, prompt, params, lora_request=lora, priority=priority,
                                     trace_headers=self._trace, data_parallel_rank=place)
        )
        try:
            collector = await asyncio.shield(adding)
        except asyncio.CancelledError:
            # Not yet known whether the engine has it: find out, else nobody could ever abort it.
            collector = await asyncio.wait_for(adding, _RELEASE_TIMEOUT_S)
            self._unclaimed = None
            await self._engine.abort(collector.request_id, internal=True)
            raise
        self._unclaimed = None
        return collector

    async def _follow(self, collector: Any, stream: ResponseStream | None) -> None:
        try:
            finished = False
            while not finished:
                output = collector.get_nowait() or await collector.get()
                finished = output.finished
                if stream is not None:
                    stream.push(output)
        except asyncio.CancelledError:
            await self._engine.abort(collector.request_id, internal=True)
            raise
        finally:
            collector.close()

    async def release(self) -> None:
        """Gives a handoff back that the engine never took."""
        handoff, self._unclaimed = self._unclaimed, None
        if handoff is not None:
            await self._returns.give_back(self.request.request_id, handoff)


def _translate(exc: Exception, *, dead: bool) -> TandemError:
    """`dead`: with the client side of an engine all its requests fail at once, with whatever killed it; another worker can go on."""
    if isinstance(exc, TandemError):
        return exc
    if isinstance(exc, GracefulHTTPError):  # vLLM's own admission control
        return UnavailableError(f"the engine's queue is full: retry later ({exc})")
    if isinstance(exc, VLLMClientError | ValueError | TypeError | OverflowError):
        return RequestError(str(exc) or type(exc).__name__)
    log.error("request.failed", exc_info=exc)
    if dead:
        return UnavailableError(f"the engine of this worker died of {type(exc).__name__}: {exc}; retry on another worker")
    return EngineError(f"the engine failed on this request: {type(exc).__name__}: {exc}")


def _ids_of(images: tuple[ReadImage, ...]) -> tuple[str, ...]:
    return tuple(image.content_id for image in images)
