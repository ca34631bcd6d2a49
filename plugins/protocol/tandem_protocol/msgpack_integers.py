# SPDX-License-Identifier: Apache-2.0
"""Reads a msgpack array of integers (or of byte strings) into NumPy without a Python object per element."""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_protocol.compiled import Int, compiled, inlined, load_u32_big_endian, load_u64_big_endian, read_only

_BYTE = np.uint64(8)

# Integers below 2**32 are read without a branch on their width, which is unpredictable: by first byte, how many bytes
# the element has (0: not such an integer), where its digits begin, and how far four bytes from there are shifted.
_STEP = np.array([1] * 0x80 + [0] * 0x4C + [2, 3, 5] + [0] * 0x31, np.uint64)
_BEGIN = np.array([0] * 0x80 + [1] * 0x80, np.uint64)
_SHIFT = np.array([24] * 0x80 + [0] * 0x4C + [24, 16, 0] + [0] * 0x31, np.uint64)


def read_hashes(raw: msgspec.Raw) -> NDArray[np.uint64]:
    """uint64 [n] of a raw msgpack array: signed integers as two's complement, byte strings as their last 8 bytes, big-endian.

    Raises msgspec.ValidationError for anything else.
    """
    return _checked(*_read_wide(read_only(np.frombuffer(raw, np.uint8))))


def read_tokens(raw: msgspec.Raw) -> NDArray[np.uint32]:
    """uint32 [n], as `read_hashes`, the low 32 bits of each."""
    return _checked(*_read_narrow(read_only(np.frombuffer(raw, np.uint8))))


def warm_up() -> None:
    """Compiles, or loads from the cache."""
    raw = msgspec.Raw(msgspec.msgpack.encode([1, 2]))
    read_hashes(raw)
    read_tokens(raw)


def _checked(values: NDArray[Any], ok: bool) -> NDArray[Any]:
    if not ok:
        raise msgspec.ValidationError("expected an array of integers or byte strings")
    return values


@inlined
def _big_endian(raw: NDArray[np.uint8], at: Int, size: Int) -> Int:
    value = np.uint64(0)
    for index in range(at, at + size):
        value = (value << _BYTE) | np.uint64(raw[index])
    return value


@inlined
def _sign_extended(value: Int, size: Int) -> Int:
    shift = np.uint64(64 - 8 * size)
    return np.uint64(np.int64(value << shift) >> np.int64(shift))


@inlined
def _header(raw: NDArray[np.uint8]) -> tuple[Int, Int]:
    """Elements and where the first begins; -1 elements if it is no array or longer than its bytes."""
    count: Int = np.int64(-1)
    at = 1
    if len(raw) >= 1 and 0x90 <= raw[0] <= 0x9F:
        count = np.int64(raw[0]) - 0x90
    elif len(raw) >= 3 and raw[0] == 0xDC:
        count, at = np.int64(_big_endian(raw, 1, 2)), 3
    elif len(raw) >= 5 and raw[0] == 0xDD:
        count, at = np.int64(_big_endian(raw, 1, 4)), 5
    return (count, at) if count <= len(raw) - at else (-1, at)


@inlined
def _element(raw: NDArray[np.uint8], at: Int) -> tuple[Int, Int]:
    """The element at `at` and where the next one begins; -1 there if it is none of ours."""
    kind: Int = np.int64(raw[at])
    value: Int = np.uint64(0)
    following: Int = np.int64(-1)
    if kind <= 0x7F:
        value, following = np.uint64(kind), at + 1
    elif kind >= 0xE0:
        value, following = _sign_extended(np.uint64(kind), 1), at + 1
    elif 0xCC <= kind <= 0xCF or 0xD0 <= kind <= 0xD3:
        size = 1 << (kind & 3)
        following = at + 1 + size
        if following <= len(raw):
            value = _big_endian(raw, at + 1, size)
            value = _sign_extended(value, size) if kind >= 0xD0 else value
    elif 0xC4 <= kind <= 0xC6:
        prefix = 1 << (kind - 0xC4)
        if at + 1 + prefix <= len(raw):
            length: Int = np.int64(_big_endian(raw, at + 1, prefix))
            following = at + 1 + prefix + length
            if following <= len(raw):
                value = _big_endian(raw, following - min(length, 8), min(length, 8))
    return value, (following if following <= len(raw) else -1)


@inlined
def _fill(raw: NDArray[np.uint8], at: Int, values: NDArray[Any]) -> Int:
    """Reads len(values) elements; False if they are not what they should be or don't end with the bytes."""
    base, place = np.uint64(raw.ctypes.data), np.uint64(at)
    size, roomy = np.uint64(len(raw)), np.uint64(max(len(raw) - 8, 0))
    for index in range(len(values)):
        kind = raw[place] if place < size else np.uint8(0xC1)
        if place < roomy and _STEP[kind] > 0:
            values[index] = load_u32_big_endian(base + place + _BEGIN[kind]) >> _SHIFT[kind]
            place += _STEP[kind]
        elif place < roomy and kind == 0xCF:
            values[index] = load_u64_big_endian(base + place + np.uint64(1))
            place += np.uint64(9)
        else:
            values[index], following = _element(raw, np.int64(place)) if place < size else (np.uint64(0), np.int64(-1))
            if following < 0:
                return False
            place = np.uint64(following)
    return place == size


@compiled
def _read_wide(raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], bool]:
    count, at = _header(raw)
    values = np.empty(max(count, 0), np.uint64)
    return values, count >= 0 and _fill(raw, at, values)


@compiled
def _read_narrow(raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], bool]:
    count, at = _header(raw)
    values = np.empty(max(count, 0), np.uint32)
    return values, count >= 0 and _fill(raw, at, values)
