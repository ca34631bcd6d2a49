# SPDX-License-Identifier: Apache-2.0
"""A pipeline of one text stage for plain Llamas, so that a stage runs without a multimodal model."""

from vllm_omni.config.pipeline_registry import OMNI_PIPELINES, register_pipeline
from vllm_omni.config.stage_config import PipelineConfig, StageExecutionType, StagePipelineConfig


def register() -> None:
    """Repeating it does nothing."""
    if "llama" in OMNI_PIPELINES:
        return
    stage = StagePipelineConfig(
        stage_id=0, model_stage="thinker", execution_type=StageExecutionType.LLM_AR, final_output=True, final_output_type="text",
        owns_tokenizer=True, engine_output_type="text", sampling_constraints={"detokenize": True},
    )
    register_pipeline(PipelineConfig(model_type="llama", model_arch="LlamaForCausalLM", stages=(stage,)))


def skip_trial_image() -> None:
    """Two steps of 512x512 at the start take 43 s on two slow cores."""
    from vllm_omni.diffusion.diffusion_engine import DiffusionEngine

    DiffusionEngine.run_startup_warmup = lambda _: None
