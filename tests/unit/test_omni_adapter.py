# SPDX-License-Identifier: Apache-2.0
"""The adapter around AsyncOmni, over vllm-omni's own parameters and errors and a stand-in of its engine; skipped without it."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, Histogram

from tandem_protocol.errors import EngineError, RequestError, UnavailableError
from tandem_worker.omni.pipeline import Order
from tandem_worker.omni.terms import StageKind, sampling_by_stage

pytest.importorskip("vllm_omni", exc_type=ImportError)

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError
from vllm_omni.errors import OmniClientError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from tandem_worker.omni.async_omni import AsyncOmniPipeline


class Omni:
    """An AsyncOmni of a thinker that makes text and a painter; raises `failure` for every request."""

    def __init__(self, failure: Exception | None = None) -> None:
        told = (SimpleNamespace(final_output=True, final_output_type="text", model_stage="thinker"),
                SimpleNamespace(final_output=True, final_output_type="image", model_stage=None))
        configs = [SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=False)), None]
        self.engine = SimpleNamespace(get_stage_metadata=told.__getitem__, stage_vllm_configs=configs, stage_clients=[None, None],
                                      stage_configs=[SimpleNamespace(prompt_transform_func=None)] * 2)
        tokens, steps = SamplingParams(temperature=0.4, max_tokens=64, seed=5), OmniDiffusionSamplingParams(height=512)
        self.default_sampling_params_list = [tokens, steps]
        self.sampling_constraints_list: list[dict[str, Any]] = [{"top_k": 1}, {}]
        self.errored = False
        self.failure = failure
        self.given: dict[str, Any] = {}

    async def generate(self, prompt: Any, **given: Any) -> AsyncIterator[str]:
        """One output."""
        self.given = {"prompt": prompt, **given}
        if self.failure is not None:
            raise self.failure
        yield "output"

    async def check_health(self) -> None:
        """Raises while it fails."""
        if self.failure is not None:
            raise self.failure


async def asked(omni: Omni, sampling: dict[str, Any], *, streamed: bool = True) -> list[Any]:
    """The parameters that reach the stages."""
    pipeline = AsyncOmniPipeline(omni)
    order = Order("r", {"prompt": "Say"}, sampling_by_stage(sampling, pipeline.stages), ("text",), streamed)
    assert [output async for output in pipeline.generate(order)] == ["output"]
    return list(omni.given["sampling_params_list"])


def test_the_stages_are_what_the_engine_tells() -> None:
    """What a pipeline sets itself, and what is the worker's, no request may set."""
    thinker, painter = AsyncOmniPipeline(Omni()).stages
    assert (thinker.kind, thinker.name, thinker.makes) == (StageKind.LLM, "thinker", "text")
    assert (painter.kind, painter.name, painter.makes) == (StageKind.DIFFUSION, "", "image")
    assert (thinker.takes_images, painter.takes_images) == (False, True)
    assert {"temperature", "max_tokens", "stop", "structured_outputs"} <= thinker.parameters.keys()
    assert not {"top_k", "n", "output_kind", "detokenize"} & thinker.parameters.keys()
    assert {"num_inference_steps", "height", "guidance_scale", "seed"} <= painter.parameters.keys()
    assert not {"latents", "generator", "modules"} & painter.parameters.keys()


async def test_a_requests_parameters_lie_over_the_stages_defaults() -> None:
    """All others stay as they are, and the shared defaults untouched."""
    omni = Omni()
    tokens, steps = await asked(omni, {"temperature": 0, "num_inference_steps": 3, "guidance_scale": 2, "stop": ["x"]})
    assert (tokens.temperature, tokens.max_tokens, tokens.seed, tokens.stop) == (0.0, 64, 5, ["x"])
    assert (steps.num_inference_steps, steps.height, steps.guidance_scale, steps.guidance_scale_provided) == (3, 512, 2.0, True)
    assert omni.default_sampling_params_list[0].temperature == 0.4
    assert omni.given["output_modalities"] == ["text"]


@pytest.mark.parametrize(("streamed", "kind"), [(True, RequestOutputKind.DELTA), (False, RequestOutputKind.FINAL_ONLY)])
async def test_outputs_come_as_the_request_wants_them(streamed: bool, kind: RequestOutputKind) -> None:
    """What is new, or all at the end."""
    assert (await asked(Omni(), {}, streamed=streamed))[0].output_kind is kind


async def test_structured_outputs_are_taken_as_json() -> None:
    """As vLLM's own class."""
    [tokens, _] = await asked(Omni(), {"structured_outputs": {"choice": ["yes", "no"]}})
    assert tokens.structured_outputs.choice == ["yes", "no"]


async def test_values_that_vllm_refuses_are_the_clients() -> None:
    """With vLLM's own sentence."""
    with pytest.raises(RequestError, match="temperature"):
        await asked(Omni(), {"temperature": -1})


@pytest.mark.parametrize(("failure", "dead", "kind"), [
    (OmniClientError("guarded"), False, RequestError), (ValueError("too long"), False, RequestError),
    (RuntimeError("modulo by zero"), False, EngineError), (RuntimeError("gone"), True, UnavailableError),
    (EngineDeadError("gone"), False, UnavailableError),
])
async def test_errors_are_whose_fault_they_are(failure: Exception, dead: bool, kind: type[Exception]) -> None:
    """By vllm-omni's class, and by whether it is still alive."""
    omni = Omni(failure)
    omni.errored = dead
    with pytest.raises(kind):
        await asked(omni, {})


async def test_a_stage_without_a_living_replica_is_unwell() -> None:
    """The reason is vllm-omni's."""
    await AsyncOmniPipeline(Omni()).check_health()
    with pytest.raises(UnavailableError, match=r"^Stage-1 has no live replica$"):
        await AsyncOmniPipeline(Omni(EngineDeadError("Stage-1 has no live replica"))).check_health()


def test_its_pulse_is_what_vllm_counts_of_its_steps() -> None:
    """Over all stages; where one of them is of diffusion it isn't the whole pulse."""
    counted = Histogram("vllm:iteration_tokens_total", "As vLLM's.", ["stage"])
    try:
        for stage, steps in (("0", 3), ("1", 2)):
            for _ in range(steps):
                counted.labels(stage).observe(1)
        pipeline, talking = AsyncOmniPipeline(Omni()), AsyncOmniPipeline(Omni())
        talking.stages = talking.stages[:1]
        assert (pipeline.steps, pipeline.tells_steps, talking.tells_steps) == (5, False, True)
    finally:
        REGISTRY.unregister(counted)
    assert (talking.steps, talking.tells_steps) == (0, False), "without log_stats"
