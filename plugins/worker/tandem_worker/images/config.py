# SPDX-License-Identifier: Apache-2.0
"""Settings of images in requests. Limits are per request, over all of its images together: they bound a worker's memory and time."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem_protocol.settings import parse_bool, parse_float, parse_int, parse_words, resolve, setting


def _folder(text: str) -> str:
    if text and not Path(text).is_absolute():
        raise ValueError("expected an absolute path")
    return text


@dataclass(frozen=True)
class ImageSettings:
    """Resolved from the environment alone: the same for all workers of a server."""

    image_max_count: int = setting(
        env="TANDEM_IMAGE_MAX_COUNT", default=32, parse=parse_int(1, 10_000), unit="images", flag=False,
        help="The most images of one request, frames of a video included.",
    )
    image_max_bytes: int = setting(
        env="TANDEM_IMAGE_MAX_BYTES", default=33_554_432, parse=parse_int(1, 1 << 40), unit="bytes", flag=False,
        help="The most bytes of one request's image files, as they are before they are decoded.",
    )
    image_max_pixels: int = setting(
        env="TANDEM_IMAGE_MAX_PIXELS", default=67_108_864, parse=parse_int(1, 1 << 40), unit="pixels", flag=False,
        help="The most pixels of one request's images, looked up before any is decoded: a few bytes of PNG can be a gigapixel.",
    )
    image_timeout_s: float = setting(
        env="TANDEM_IMAGE_TIMEOUT_S", default=15.0, parse=parse_float(0.01, 3600), unit="s", flag=False,
        help="How long the images of one request may take to be fetched and decoded, redirects and waiting for a turn included.",
    )
    image_concurrency: int = setting(
        env="TANDEM_IMAGE_CONCURRENCY", default=8, parse=parse_int(1, 1_000), unit="images", flag=False,
        help="Images that one worker fetches or decodes at a time; decoding takes a core each.",
    )
    image_hosts: tuple[str, ...] = setting(
        env="TANDEM_IMAGE_HOSTS", default=(), parse=parse_words, flag=False,
        help="Hosts that images may be fetched from; `.example.org` means it and all below. Empty: any.",
    )
    image_allow_private: bool = setting(
        env="TANDEM_IMAGE_ALLOW_PRIVATE", default=False, parse=parse_bool, flag=False,
        help="Fetch from private, loopback and link-local addresses, too. Off: clients could read what only this host may reach.",
    )
    image_root: str = setting(
        env="TANDEM_IMAGE_ROOT", default="", parse=_folder, flag=False,
        help="Folder that `file:` images must lie in, links followed. Empty: `file:` is refused, since any client could name a file.",
    )


def load_settings(environ: Mapping[str, str] | None = None) -> ImageSettings:
    """From the environment. Raises ConfigError."""
    return resolve(ImageSettings, {}, os.environ if environ is None else environ)
