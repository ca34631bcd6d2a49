# SPDX-License-Identifier: Apache-2.0
"""From an image file to pixels. Edge module: Pillow. Pure otherwise, and called on threads, since Pillow releases the GIL."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem_protocol.errors import RequestError, TandemError
from tandem_protocol.image_files import content_id

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Of all that Pillow reads: no format that runs other programs (EPS) or holds documents."""


@dataclass(frozen=True)
class ReadImage:
    """One image of a request."""

    content_id: str
    """Hash of the file: equal files are equal images, and with it a router knows blocks of images that it never decoded."""
    pixels: Any
    """A PIL image in RGB. Of an animated file the first frame, as in vllm_backend."""


def decode(data: bytes, charge_pixels: Callable[[int], None]) -> ReadImage:
    """Decodes a file; `charge_pixels` takes its size off the request's allowance before any pixel is. Raises RequestError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            charge_pixels(image.width * image.height)
            return ReadImage(content_id(data), image.convert("RGB"))
    except TandemError:
        raise
    except Image.DecompressionBombError as exc:  # Pillow's own bound, of 179 megapixels
        raise RequestError(f"an image is too large: {exc}") from exc
    except UnidentifiedImageError as exc:
        raise RequestError(f"an element of image is not an image: send one of {', '.join(FORMATS)}") from exc
    except Exception as exc:  # for a broken file Pillow's decoders raise whatever their code runs into
        raise RequestError(f"an image is truncated or broken: {exc}") from exc
