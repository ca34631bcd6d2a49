# SPDX-License-Identifier: Apache-2.0
"""What image files are known by, and those that a request carries itself: for workers, which decode them, and routers, which don't."""

import base64
import binascii
import hashlib
from urllib.parse import unquote_to_bytes

from tandem_protocol.errors import RequestError


def content_id(data: bytes) -> str:
    """What an image file is known by in block hashes, embeddings and handoffs: hex, 128 bits. Equal files are equal images."""
    return hashlib.blake2b(data, digest_size=16, person=b"tandem-image").hexdigest()


def inline_bytes(item: bytes) -> bytes | None:
    """The file that an element of the tensor `image` carries, in base64 or as a `data:` URL; None for a URL. Raises RequestError."""
    scheme = item[:6].split(b":", 1)[0].lower() if b":" in item[:6] else b""
    if scheme == b"data":
        return _from_data(item)
    return _from_base64(item) if not scheme else None


def _from_data(item: bytes) -> bytes:
    head, comma, body = item.partition(b",")
    if not comma:
        raise RequestError("a data: image has no comma: write data:image/png;base64,...")
    plain = unquote_to_bytes(body) if b"%" in body else body
    return _from_base64(plain) if head.lower().endswith(b";base64") else plain


def _from_base64(item: bytes) -> bytes:
    try:
        return base64.b64decode(item, validate=True)
    except binascii.Error as exc:
        raise RequestError(f"an element of image is not a base64-encoded image nor a URL: {exc}") from exc
