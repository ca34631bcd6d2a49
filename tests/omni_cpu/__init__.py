# SPDX-License-Identifier: Apache-2.0
"""A CPU platform of vllm-omni, for tests: it ships none. It and the pipelines are found by entry points, which `omni_rig` writes.

torchvision's CUDA build finds no operators on a CPU, so two of them are declared here, which nothing calls.
"""

import contextlib


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
    import torch

    with contextlib.suppress(RuntimeError):  # declared already, by another entry point or by a torchvision for CPUs
        _LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _LIBRARIES[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_LIBRARIES: list[object] = []
"""Operators live as long as their library."""
