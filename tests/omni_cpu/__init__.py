# SPDX-License-Identifier: Apache-2.0
"""A CPU platform of vllm-omni, for tests: it ships none. It and the pipelines are found by entry points, which `omni_rig` writes.

torchvision's CUDA build doesn't load its operators on a CPU, so two of them are declared here, which nothing calls.
"""

import sys


def platform() -> str | None:
    """Entry point of `vllm_omni.platform_plugins`: the class, where vLLM itself runs on a CPU."""
    from vllm.platforms import current_platform

    _declare_operators()
    return "omni_cpu.platform.CpuOmniPlatform" if current_platform.is_cpu() else None


def pipelines() -> None:
    """Entry point of `vllm_omni.general_plugins`: a pipeline for plain Llamas, and no trial image of 512x512 at the start."""
    from omni_cpu.pipelines import register, skip_trial_image

    _declare_operators()
    register()
    skip_trial_image()


def _declare_operators() -> None:
    """Only where torchvision doesn't import; one for CPUs has them."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


_LIBRARIES: list[object] = []
"""Operators live as long as their library."""
