# SPDX-License-Identifier: Apache-2.0
"""Settings of omni workers alone: bounds of what one request may have made. A stage checks none, computes what it is asked for, and dies
where that doesn't fit its memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tandem_protocol.settings import parse_int, resolve, setting


@dataclass(frozen=True)
class OmniSettings:
    """Resolved from the environment alone: the same for all workers of a server."""

    omni_max_pixels: int = setting(
        env="TANDEM_OMNI_MAX_PIXELS", default=67_108_864, parse=parse_int(1, 1 << 40), unit="pixels", flag=False,
        help="The most pixels that one request may have made, over all its images. A side that it doesn't name counts as 1024.",
    )
    omni_max_steps: int = setting(
        env="TANDEM_OMNI_MAX_STEPS", default=1_000, parse=parse_int(1, 1_000_000), unit="steps", flag=False,
        help="The most steps of denoising that one request may ask for: others wait for them, even if it is aborted.",
    )


def load_settings(environ: Mapping[str, str] | None = None) -> OmniSettings:
    """From the environment. Raises ConfigError."""
    return resolve(OmniSettings, {}, os.environ if environ is None else environ)
