# SPDX-License-Identifier: Apache-2.0
"""Token sequences that continue themselves: every next token is a function of the whole sequence so far.

A rolling polynomial state over all tokens (modulo 2^64, odd base) gives both the block hashes and the next token in
constant time. So `prompt + first tokens` continues exactly as `prompt` did: what migration from one worker to another
relies on. The hashes are the mock's own, as vLLM's are vLLM's: routers must not depend on them.
"""

import functools

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
U64 = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_BASE = 0x5851F42D4C957F2D
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
_TOKEN_FACTOR, _TOKEN_SALT = 0xD6E8FEB86659FD93, 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class TokenChain:
    """One request's tokens: the prompt, and what was generated after it. Not thread-safe."""

    __slots__ = ("_block_size", "_generated", "_prompt", "_state", "_vocabulary", "block_hashes", "length")

    def __init__(self, prompt: Tokens, block_size: int, vocabulary: int) -> None:
        states = _states(prompt)
        self._prompt = prompt
        self._block_size = block_size
        self._vocabulary = vocabulary
        self._generated: list[int] = []
        self._state = int(states[-1])
        self.length = len(prompt)
        self.block_hashes: list[int] = _mixed(states[block_size - 1 :: block_size]).tolist()
        """Chained hash of each full block: equal for equal tokens from the first on, else not."""

    def generate(self) -> int:
        """Appends the next token, 0 <= token < vocabulary, and returns it."""
        token = (self._state >> 32) % self._vocabulary
        self._state = (self._state * _BASE + token * _TOKEN_FACTOR + _TOKEN_SALT) & _MASK
        self._generated.append(token)
        self.length += 1
        if self.length % self._block_size == 0:
            self.block_hashes.append(_mix(self._state))
        return token

    def tokens(self, start: int, end: int) -> Tokens:
        """Tokens [start, end) as INT32."""
        split = len(self._prompt)
        if end <= split:
            return self._prompt[start:end]
        generated = np.asarray(self._generated[max(0, start - split) : end - split], dtype=np.int32)
        return np.concatenate([self._prompt[start:], generated]) if start < split else generated


def _states(tokens: Tokens) -> U64:
    """The rolling state after each token: s[i] = s[i-1] * base + token[i] * factor + salt."""
    powers, inverses = _powers(1 << max(10, (len(tokens) - 1).bit_length()))
    terms = (tokens.astype(np.uint64) * np.uint64(_TOKEN_FACTOR) + np.uint64(_TOKEN_SALT)) * inverses[: len(tokens)]
    states: U64 = np.cumsum(terms, dtype=np.uint64) * powers[: len(tokens)]
    return states


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> tuple[U64, U64]:
    return _geometric(_BASE, count), _geometric(_BASE_INVERSE, count)


def _geometric(ratio: int, count: int) -> U64:
    factors = np.full(count, ratio, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _mix(value: int) -> int:
    """splitmix64's finaliser."""
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _mixed(values: U64) -> U64:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    return values ^ (values >> np.uint64(31))
