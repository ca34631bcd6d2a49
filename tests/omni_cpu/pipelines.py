# SPDX-License-Identifier: Apache-2.0
"""Pipelines for tests: plain Llamas alone, before a Stable Diffusion that paints what they say, and before a voice that speaks it."""

from vllm.model_executor.models import ModelRegistry
from vllm_omni.config.pipeline_registry import OMNI_PIPELINES, register_pipeline
from vllm_omni.config.stage_config import PipelineConfig, StageExecutionType, StagePipelineConfig
from vllm_omni.model_executor.models.registry import OmniModelRegistry

THINKER_FOLDER = "thinker"
"""Below the model's, in pipelines of several stages."""


def _thinker(engine_output_type: str = "text", **more: object) -> StagePipelineConfig:
    return StagePipelineConfig(
        stage_id=0, model_stage="thinker", execution_type=StageExecutionType.LLM_AR, model_arch="LlamaForCausalLM", owns_tokenizer=True,
        final_output=True, final_output_type="text", engine_output_type=engine_output_type,
        sampling_constraints={"detokenize": True}, **more,
    )


def _painter() -> StagePipelineConfig:
    return StagePipelineConfig(
        stage_id=1, model_stage="painter", execution_type=StageExecutionType.DIFFUSION, model_arch="StableDiffusionPipeline",
        input_sources=(0,), final_output=True, final_output_type="image", custom_process_input_func="omni_cpu.bridges.painting",
    )


def _speaker(**more: object) -> StagePipelineConfig:
    # Only a stage with latent output sends something on after each of its steps.
    return _thinker("latent", async_chunk_process_next_stage_input_func="omni_cpu.bridges.speech_in_chunks", **more)


def _voice() -> StagePipelineConfig:
    return StagePipelineConfig(
        stage_id=1, model_stage="voice", execution_type=StageExecutionType.LLM_GENERATION, model_arch="TandemToyVocoder",
        model_subdir="voice", tokenizer_subdir=THINKER_FOLDER, input_sources=(0,), final_output=True, final_output_type="audio",
        engine_output_type="audio", sync_process_input_func="omni_cpu.bridges.speech", sampling_constraints={"detokenize": True},
    )


def register() -> None:
    """Repeating it does nothing."""
    for registry in (ModelRegistry, OmniModelRegistry):  # one reads configurations, the other loads
        registry.register_model("TandemToyVocoder", "omni_cpu.vocoder:ToyVocoder")
    below = {"model_subdir": THINKER_FOLDER, "tokenizer_subdir": THINKER_FOLDER}
    for model_type, architecture, stages in (
        ("llama", "LlamaForCausalLM", (_thinker(),)),
        ("tandem_story", "TandemStory", (_thinker(**below), _painter())),
        ("tandem_speech", "TandemSpeech", (_speaker(**below), _voice())),
    ):
        if model_type not in OMNI_PIPELINES:
            register_pipeline(PipelineConfig(model_type=model_type, model_arch=architecture, stages=stages))


def skip_trial_image() -> None:
    """Two steps of 512x512 at the start take 43 s on two slow cores."""
    from vllm_omni.diffusion.diffusion_engine import DiffusionEngine

    DiffusionEngine.run_startup_warmup = lambda _: None
