# SPDX-License-Identifier: Apache-2.0
"""A CPU platform of vllm-omni, for tests: it ships none. It and the pipelines are found by entry points, which `omni_rig` writes."""


def platform() -> str | None:
    """Entry point of `vllm_omni.platform_plugins`: the class, where vLLM itself runs on a CPU."""
    from vllm.platforms import current_platform

    return "omni_cpu.platform.CpuOmniPlatform" if current_platform.is_cpu() else None


def pipelines() -> None:
    """Entry point of `vllm_omni.general_plugins`: a pipeline for plain Llamas, and no trial image of 512x512 at the start."""
    from omni_cpu.pipelines import register, skip_trial_image

    register()
    skip_trial_image()
