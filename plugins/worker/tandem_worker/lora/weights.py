# SPDX-License-Identifier: Apache-2.0
"""Reads safetensors files without torch: names, shapes, types, and whether all numbers are finite.

Format: https://github.com/huggingface/safetensors#format - a little-endian u64, so many bytes of JSON, then the tensors' bytes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem_protocol.errors import RequestError

_MOST_HEADER_BYTES = 100_000_000
"""The format's own bound."""
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0000000000000), "F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80),
}
"""An exponent of ones alone is an infinity or no number."""
_SLICE = 1 << 22


@dataclass(frozen=True)
class Tensor:
    """One entry of a header; offsets count from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises RequestError for what is no whole safetensors file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _MOST_HEADER_BYTES)))
        tensors = {name: _tensor(name, entry, 8 + size) for name, entry in header.items() if name != "__metadata__"}
        _check_length(tensors, 8 + size, path.stat().st_size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise RequestError(f"{path.name} is no whole safetensors file ({exc}): save the adapter anew") from exc
    except OSError as exc:
        raise RequestError(f"{path.name} can't be read ({exc.strerror})") from exc
    return tensors


def _check_length(tensors: dict[str, Tensor], header_bytes: int, size_bytes: int) -> None:
    if max((tensor.end for tensor in tensors.values()), default=header_bytes) != size_bytes:
        raise ValueError("its length is not that of its tensors")


def _tensor(name: str, entry: dict[str, Any], offset: int) -> Tensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"{name} has impossible bounds")
    words = _EXPONENTS.get(entry["dtype"])
    if words and math.prod(shape) * np.dtype(words[0]).itemsize != end - begin:
        raise ValueError(f"{name} has another size than its shape")
    return Tensor(str(entry["dtype"]), shape, offset + begin, offset + end)


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises RequestError for a tensor that is not of floating point numbers, or has an infinity or NaN."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _EXPONENTS:
            raise RequestError(f"tensor {name} is of type {tensor.dtype}: save the adapter in float32, float16 or bfloat16")
        words, exponent = _EXPONENTS[tensor.dtype]
        if tensor.begin == tensor.end:
            continue
        values = np.memmap(path, words, "r", tensor.begin, (math.prod(tensor.shape),))
        for first in range(0, len(values), _SLICE):
            if (values[first : first + _SLICE] & words(exponent) == exponent).any():
                raise RequestError(f"tensor {name} has infinities or NaNs: the adapter's training has diverged")


def base_shapes(model: Path) -> dict[str, Tensor]:
    """The tensors of a model's folder by name; empty where they aren't kept as safetensors."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(model.glob("*.safetensors")) if model.is_dir() else ():
        tensors.update(read_header(path))
    return tensors
