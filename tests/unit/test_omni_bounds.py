# SPDX-License-Identifier: Apache-2.0
"""What one request may ask of diffusion stages."""

from typing import Any

import pytest

from tandem_protocol.errors import RequestError
from tandem_worker.omni.bounds import check_bounds
from tandem_worker.omni.config import OmniSettings, load_settings
from tandem_worker.omni.terms import Stage, StageKind

STAGES = (Stage(0, StageKind.LLM, "thinker"), Stage(1, StageKind.DIFFUSION, "painter"))
MEGAPIXEL = OmniSettings(omni_max_pixels=1024 * 1024, omni_max_steps=50)


@pytest.mark.parametrize("own", [
    {}, {"height": 1024, "width": 1024}, {"width": 1024}, {"height": 512, "width": 512, "num_outputs_per_prompt": 4},
    {"resolution": 640}, {"num_inference_steps": 50, "sigmas": [0.5] * 50},
])
def test_what_fits_is_taken(own: dict[str, Any]) -> None:
    """Up to the bound itself; the other stages' parameters don't matter."""
    check_bounds(({"max_tokens": 10**9}, own), STAGES, MEGAPIXEL)


@pytest.mark.parametrize(("own", "sentence"), [
    ({"height": 1025, "width": 1024}, r"stage 1 \(painter\) is asked for 1049600 pixels, and one request may ask for 1048576 \(TANDEM_"),
    ({"height": 1032}, "1065024 pixels"), ({"num_outputs_per_prompt": 2}, "2097152 pixels"), ({"num_frames": 9}, "pixels"),
    ({"height": 512, "width": 512, "num_outputs_per_prompt": 5}, "pixels"), ({"resolution": 2048}, "pixels"),
    ({"num_inference_steps": 51}, r"51 steps, .* 50 \(TANDEM_OMNI_MAX_STEPS\)"), ({"sigmas": [0.5] * 51}, "51 steps"),
])
def test_what_does_not_fit_is_refused(own: dict[str, Any], sentence: str) -> None:
    """With the bound's name."""
    with pytest.raises(RequestError, match=sentence):
        check_bounds(({}, own), STAGES, MEGAPIXEL)


def test_the_bounds_come_from_the_environment() -> None:
    """As images' do."""
    assert load_settings({"TANDEM_OMNI_MAX_STEPS": "7"}) == OmniSettings(omni_max_steps=7)
