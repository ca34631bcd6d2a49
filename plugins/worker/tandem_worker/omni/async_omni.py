# SPDX-License-Identifier: Apache-2.0
"""vllm-omni's AsyncOmni as a Pipeline. Edge module: the only one that imports vllm-omni, in an environment of its own (docs/omni.md).

It is started on the main thread, blocks until all stages stand, and is used on the worker's event loop.
"""

import dataclasses
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, get_type_hints

from prometheus_client import REGISTRY
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError
from vllm_omni import AsyncOmni
from vllm_omni.config.stage_config import StageDeployConfig, StagePipelineConfig
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.io_support import supports_multimodal_input
from vllm_omni.engine.arg_utils import OmniEngineArgs
from vllm_omni.errors import OmniClientError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.plugins import load_omni_general_plugins

from tandem_protocol.errors import ConfigError, EngineError, RequestError, TandemError, UnavailableError
from tandem_worker.omni.arguments import OmniArguments
from tandem_worker.omni.deployment import check_pipeline, check_settings
from tandem_worker.omni.outputs import MODALITIES, StageOutput
from tandem_worker.omni.pipeline import Order
from tandem_worker.omni.terms import Stage, StageKind

log = logging.getLogger(__name__)

_OWNED = frozenset({"output_kind", "stream_interval", "skip_clone", "detokenize", "output_text_buffer_length", "n"})
"""Fields of SamplingParams that aren't a request's to set."""
_DIFFUSION = (
    "num_inference_steps", "height", "width", "seed", "guidance_scale", "guidance_scale_2", "guidance_rescale", "true_cfg_scale",
    "do_classifier_free_guidance", "num_outputs_per_prompt", "num_frames", "fps", "frame_rate", "strength", "eta", "sigmas", "quality",
    "max_sequence_length", "resolution", "layers", "cfg_normalize", "use_en_prompt", "boundary_ratio", "decode_timestep",
    "decode_noise_scale", "enable_frame_interpolation", "frame_interpolation_exp", "frame_interpolation_scale", "extra_args",
)
"""Fields of OmniDiffusionSamplingParams that a request may set; the others are tensors and marks of vllm-omni's own."""
_MARKED = {"guidance_scale": "guidance_scale_provided", "guidance_scale_2": "guidance_scale_2_provided"}
"""Fields that pipelines overlook unless a mark says that they were given."""
_REFUSED_STOP_S = 10.0
_OLDER = frozenset({"engine_args", "runtime", "is_comprehension"})
"""Settings of stages in an older form, which vllm-omni still reads or at least has in configurations of its own."""
_STEPS = "vllm:iteration_tokens_total_count"


class AsyncOmniPipeline:
    """A running AsyncOmni. Resource handling: `shutdown` ends its stages' processes."""

    def __init__(self, omni: Any) -> None:
        self._omni = omni
        self._defaults = list(omni.default_sampling_params_list)
        told = (omni.engine.get_stage_metadata(index) for index in range(len(self._defaults)))
        given = zip(told, self._defaults, omni.sampling_constraints_list, strict=True)
        self.stages: Sequence[Stage] = tuple(
            dataclasses.replace(_stage(index, *one), takes_images=_takes_images(omni.engine, index)) for index, one in enumerate(given))

    @property
    def errored(self) -> bool:
        """Whether its orchestrator is gone."""
        return bool(self._omni.errored)

    @property
    def on_cpu(self) -> bool:
        """As vLLM sees it."""
        return bool(current_platform.is_cpu())

    @property
    def tells_steps(self) -> bool:
        """Diffusion tells none; without `log_stats` nobody does."""
        return all(stage.kind is StageKind.LLM for stage in self.stages) and bool(_step_counts())

    @property
    def steps(self) -> int:
        """By the one public place in which they can be seen: vLLM counts each with outputs in a histogram, per stage and replica."""
        return int(sum(_step_counts()))

    async def generate(self, order: Order) -> AsyncGenerator[StageOutput, None]:
        """As Pipeline says."""
        try:
            params = [_params(default, own, streamed=order.streamed) for default, own in zip(self._defaults, order.sampling, strict=True)]
            outputs = self._omni.generate(dict(order.prompt), request_id=order.request_id, sampling_params_list=params,
                                          output_modalities=list(order.modalities))
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except Exception as exc:
            raise self._translated(exc) from exc

    async def check_health(self) -> None:
        """Its orchestrator and at least one replica of every stage."""
        try:
            await self._omni.check_health()
        except EngineDeadError as exc:
            raise UnavailableError(_told(exc)) from exc

    def shutdown(self, timeout: float) -> None:
        """Ends all stages."""
        self._omni.shutdown(timeout=timeout)

    def _translated(self, exc: Exception) -> TandemError:
        if isinstance(exc, TandemError):
            return exc
        if self.errored or isinstance(exc, EngineDeadError):
            return UnavailableError(f"the pipeline of this worker died ({_told(exc)}): retry on another worker or after its restart")
        if isinstance(exc, OmniClientError | ValueError | TypeError | OverflowError):
            return RequestError(_sentence(exc))
        log.error("request.failed", exc_info=exc)
        return EngineError(f"the pipeline failed on this request: {_sentence(exc)}")


def _step_counts() -> list[float]:
    return [sample.value for metric in REGISTRY.restricted_registry([_STEPS]).collect() for sample in metric.samples]


def start_pipeline(arguments: OmniArguments) -> AsyncOmniPipeline:
    """Starts all stages; blocks for as long as that takes. Raises ConfigError for what vllm-omni refuses."""
    check_settings(arguments.deployed, stage_settings())
    load_omni_general_plugins()  # which may bring pipelines; vllm-omni itself loads them too late for its own look-up
    given = dict(arguments.engine)
    if arguments.deploy_config is not None:
        given["deploy_config"] = arguments.deploy_config
    try:
        omni = AsyncOmni(model=arguments.model, **given)
    except (ValueError, TypeError, OSError, RuntimeError) as exc:
        raise ConfigError(f"vllm-omni could not start this pipeline: {_sentence(exc)}") from exc
    pipeline = AsyncOmniPipeline(omni)
    try:
        check_pipeline(pipeline.stages, arguments.deployed)
    except ConfigError:
        pipeline.shutdown(_REFUSED_STOP_S)
        raise
    return pipeline


def stage_settings() -> frozenset[str]:
    """All that a deploy configuration may say of a stage: its own fields, the arguments of either kind of engine, and what the pipeline
    says itself (vllm-omni's own configurations repeat some of that)."""
    classes = (StageDeployConfig, StagePipelineConfig, OmniEngineArgs, OmniDiffusionConfig)
    return _OLDER.union(field.name for one in classes for field in dataclasses.fields(one))


def _stage(index: int, told: Any, default: Any, constraints: Mapping[str, Any] | None) -> Stage:
    """`constraints` are what the pipeline sets whatever a request says, so that no request may say it."""
    kind = StageKind.DIFFUSION if isinstance(default, OmniDiffusionSamplingParams) else StageKind.LLM
    makes = str(told.final_output_type) if told.final_output and told.final_output_type in MODALITIES else None
    parameters = _diffusion_parameters() if kind is StageKind.DIFFUSION else _llm_parameters()
    free = {name: declared for name, declared in parameters.items() if name not in (constraints or {})}
    return Stage(index, kind, told.model_stage or "", makes, free)


def _takes_images(engine: Any, index: int) -> bool:
    """A diffusion stage in a process of its own doesn't tell, nor does a stage whose prompt is rewritten before it gets it."""
    config = engine.stage_vllm_configs[index]
    if config is not None and engine.stage_configs[index].prompt_transform_func is None:
        return bool(config.model_config.is_multimodal_model)
    told = None if config is not None else getattr(engine.stage_clients[index], "od_config", None)
    return told is None or bool(supports_multimodal_input(told)[0])


def _llm_parameters() -> Mapping[str, Any]:
    hints = get_type_hints(SamplingParams)
    return {name: hints[name] for name in SamplingParams.__struct_fields__ if not name.startswith("_") and name not in _OWNED}


def _diffusion_parameters() -> Mapping[str, Any]:
    hints = get_type_hints(OmniDiffusionSamplingParams)
    return {name: hints[name] for name in _DIFFUSION if name in hints}


def _params(default: Any, own: Mapping[str, Any], *, streamed: bool) -> Any:
    """A stage's defaults with the request's own over them, checked by vLLM. Raises RequestError."""
    try:
        if isinstance(default, OmniDiffusionSamplingParams):
            marks = {_MARKED[name]: True for name in own if name in _MARKED}
            return dataclasses.replace(default, **own, **marks)
        kind = RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY
        values = {name: getattr(default, name) for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
        return SamplingParams(**{**values, **own, "output_kind": kind})
    except Exception as exc:  # several types, all about the client's values
        raise RequestError(f"sampling parameters are not valid: {_sentence(exc)}") from exc


def _told(exc: Exception) -> str:
    """The last of its arguments: vLLM puts a sentence about stack traces before what is said of an engine's death."""
    return str(exc.args[-1]) if exc.args else type(exc).__name__


def _sentence(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(exc).__name__


