# SPDX-License-Identifier: Apache-2.0
"""Block keys: Tandem's own identity of a KV block, computed from token ids alone.

A key is a u64 that stands for a block's tokens and everything before them: the chained hash over the token ids of
each block, rooted in the LoRA adapter's name, mixed with a block's multimodal content. Routers compute it from prompts
and from the tokens in engines' events, so that it depends on no engine's hash seed. Keys are never 0: tables use 0 for
"empty". The hash is wyhash's multiply-and-fold over 64-bit words: fast and well mixed, not cryptographic.
"""

import functools
import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_protocol.compiled import compiled, fold_multiply, inlined, load_u64, read_only
from tandem_protocol.errors import RequestError

Keys = NDArray[np.uint64]
Tokens = Sequence[int] | NDArray[Any]

_S0 = np.uint64(0xA0761D6478BD642F)
_S1 = np.uint64(0xE7037ED1A0B428DB)
_S2 = np.uint64(0x8EBC6AF09C88C6E3)
_S3 = np.uint64(0x589965CC75374CC3)
_S4 = np.uint64(0x1D8E4E27C47D124F)
_S5 = np.uint64(0xEB44ACCAB455D165)
_S6 = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_USUAL_SIZE = 16
NO_EXTRA: Keys = read_only(np.empty(0, np.uint64))


@functools.lru_cache(maxsize=4096)
def salt_of(lora_name: str) -> int:
    """The u64 that roots the keys of an adapter's blocks; 0 for "", the base model."""
    return _digest(b"lora\0" + lora_name.encode()) if lora_name else 0


def extra_key(extra: object, lora_name: str = "") -> int:
    """u64 of one block's entry of `extra_keys` in vLLM's events: multimodal hashes with offsets, cache salt, embedding digests.

    vLLM puts the adapter's name first into the entry of every block of an adapter (`generate_block_hash_extra_keys`); it is
    left out here, since `salt_of` has it already. 0 for nothing else. Raises RequestError for what msgpack can't encode.
    """
    if isinstance(extra, list | tuple) and extra and lora_name and extra[0] == lora_name:
        extra = extra[1:]
    if extra is None or extra in ((), []):
        return 0
    try:
        return _digest(b"extra\0" + msgspec.msgpack.encode(extra, order="deterministic"))
    except (TypeError, msgspec.MsgspecError) as exc:
        raise RequestError(f"a block's extra keys can't be encoded ({exc}): give None, strings, numbers, bytes or lists of them") from exc


def hash_blocks(token_ids: Tokens, block_size: int, salt: int = 0, extra: NDArray[Any] | None = None) -> Keys:
    """Keys of a sequence's full blocks: uint64 [len(token_ids) // block_size].

    `token_ids`: any integers below 2**32, in an array or a sequence. `extra`: uint64, one per full block, or None.
    Raises RequestError if the sizes don't fit.
    """
    return extend(root_of(salt), token_ids, block_size, extra)


def extend(parent_key: int, token_ids: Tokens, block_size: int, extra: NDArray[Any] | None = None) -> Keys:
    """As `hash_blocks`, for blocks that follow the block of `parent_key` (or `root_of(salt)`)."""
    if block_size < 1:
        raise RequestError(f"block_size is {block_size}: it must be at least 1")
    tokens = as_tokens(token_ids)
    blocks = len(tokens) // block_size
    extras = NO_EXTRA if extra is None else read_only(np.ascontiguousarray(extra, np.uint64))
    if extra is not None and len(extras) != blocks:
        raise RequestError(f"{len(extras)} extra keys for {blocks} full blocks: give one per full block (0 for none), or None")
    return _chain(np.uint64(parent_key), tokens, block_size, extras)


def root_of(salt: int) -> int:
    """What the first block of a sequence takes as its parent's key."""
    return int(_root(np.uint64(salt)))


def as_tokens(token_ids: Tokens) -> NDArray[np.uint32]:
    """Token ids as a contiguous, read-only uint32 array; without a copy where they are 32 bits wide already."""
    if not isinstance(token_ids, np.ndarray):
        return read_only(np.frombuffer(array("I", token_ids), np.uint32))  # half of NumPy's time for a list
    if token_ids.dtype == np.int32:
        token_ids = np.ascontiguousarray(token_ids).view(np.uint32)
    return read_only(np.ascontiguousarray(token_ids, np.uint32))


def warm_up() -> None:
    """Compiles, or loads from the cache, all that is compiled here."""
    hash_blocks(np.arange(20, dtype=np.int32), 16, salt_of("warm"), np.zeros(1, np.uint64))


def _digest(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") or 1


@compiled
def _root(salt: np.uint64) -> np.uint64:
    return fold_multiply(fold_multiply(salt ^ _S5, _S3), _S0) | _ONE


@inlined
def _pair(start: np.uint64, at: int) -> np.uint64:
    # Two tokens, the first below: we run on little-endian machines alone.
    return load_u64(start + np.uint64(4 * at))


@inlined
def _block(tokens: NDArray[np.uint32], start: int, size: int) -> np.uint64:
    """Hash of one block's tokens alone; two lanes, so that the multiplications overlap."""
    even, odd, at = _S0 ^ np.uint64(size), _S1, 0
    begin = np.uint64(tokens.ctypes.data) + np.uint64(4 * start)
    while at + 8 <= size:
        even = fold_multiply(even ^ _pair(begin, at), _S2 ^ _pair(begin, at + 2))
        odd = fold_multiply(odd ^ _pair(begin, at + 4), _S3 ^ _pair(begin, at + 6))
        at += 8
    while at < size:
        even = fold_multiply(even ^ np.uint64(tokens[start + at]), _S2 ^ odd)
        at += 1
    return fold_multiply(even ^ _S4, odd ^ _S5)


@inlined
def _chain_blocks(keys: Keys, parent: np.uint64, tokens: NDArray[np.uint32], size: int, extra: Keys) -> None:
    for index in range(len(keys)):
        mixed = _block(tokens, index * size, size)
        if len(extra) > 0 and extra[index] != _ZERO:
            mixed = fold_multiply(mixed ^ extra[index], _S6)
        parent = fold_multiply(fold_multiply(parent ^ _S1, mixed ^ _S2) ^ _S6, _S3)
        parent = _ONE if parent == _ZERO else parent
        keys[index] = parent


@inlined
def chain_into(keys: Keys, parent: np.uint64, tokens: NDArray[np.uint32], size: int, extra: Keys) -> None:
    """Fills `keys` [n] from the tokens [>= n * size] of blocks that follow `parent`; `extra` is empty or [n]. For compiled callers."""
    if size == _USUAL_SIZE:
        _chain_blocks(keys, parent, tokens, _USUAL_SIZE, extra)  # compiled for this size alone
    else:
        _chain_blocks(keys, parent, tokens, size, extra)


@compiled
def _chain(parent: np.uint64, tokens: NDArray[np.uint32], size: int, extra: Keys) -> Keys:
    keys = np.empty(len(tokens) // size, np.uint64)
    chain_into(keys, parent, tokens, size, extra)
    return keys
