# SPDX-License-Identifier: Apache-2.0
"""Whether what a request asks of diffusion stages is within the worker's bounds. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tandem_protocol.errors import RequestError
from tandem_worker.omni.config import OmniSettings
from tandem_worker.omni.terms import Stage, StageKind

_USUAL_SIDE = 1024
"""Of an image whose size is left to the model."""


def check_bounds(sampling: Sequence[Mapping[str, Any]], stages: Sequence[Stage], bounds: OmniSettings) -> None:
    """`sampling` as from `terms.sampling_by_stage`. Raises RequestError with the bound's name."""
    for stage, own in zip(stages, sampling, strict=True):
        if stage.kind is StageKind.DIFFUSION:
            _refuse_beyond(stage, "pixels", _pixels(own), bounds.omni_max_pixels, "TANDEM_OMNI_MAX_PIXELS")
            _refuse_beyond(stage, "steps", _steps(own), bounds.omni_max_steps, "TANDEM_OMNI_MAX_STEPS")


def _pixels(own: Mapping[str, Any]) -> int:
    """A single side that is given counts for both."""
    usual = own.get("resolution") or _USUAL_SIDE
    height, width = own.get("height") or own.get("width") or usual, own.get("width") or own.get("height") or usual
    return math.prod((height, width, own.get("num_outputs_per_prompt") or 1, own.get("num_frames") or 1))


def _steps(own: Mapping[str, Any]) -> int:
    return max(own.get("num_inference_steps") or 0, len(own.get("sigmas") or ()))


def _refuse_beyond(stage: Stage, what: str, asked: int, most: int, name: str) -> None:
    if asked > most:
        raise RequestError(f"{stage.title} is asked for {asked} {what}, and one request may ask for {most} ({name})")
