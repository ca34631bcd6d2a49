# SPDX-License-Identifier: Apache-2.0
"""How long one engine step takes: a linear model of what the batch holds.

    seconds = step + token * prefill tokens + attention * (prefill token, earlier token) pairs
            + sequence * decoding sequences + context * KV tokens that they read

THE DEFAULTS ARE MADE UP: roughly an 8B model in bf16 on an H200 (5 ms for a step, 25,000 prompt tokens/s, 128 KiB of KV per
token at a share of 4.8 TB/s). They give shapes, not forecasts. Measured steps can be given instead, as a JSON list of
`{"prefill_tokens", "attention_pairs", "decode_sequences", "context_tokens", "seconds"}`; five or more, fitted by
non-negative least squares.
"""

from dataclasses import astuple, dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from tandem_protocol.errors import ConfigError

_TERMS = 5


@dataclass(frozen=True)
class BatchShape:
    """What one step computes."""

    prefill_tokens: int = 0
    attention_pairs: float = 0.0
    """Sum over prefilled tokens of the tokens before them."""
    decode_sequences: int = 0
    context_tokens: int = 0
    """KV tokens that the decoding sequences read."""


@dataclass(frozen=True)
class StepTiming:
    """Coefficients, seconds each; `speedup` divides all times."""

    step_s: float = 5e-3
    prefill_token_s: float = 40e-6
    attention_pair_s: float = 1.3e-9
    decode_sequence_s: float = 20e-6
    context_token_s: float = 40e-9
    speedup: float = 1.0

    def __post_init__(self) -> None:
        """Raises ConfigError for times that can't be."""
        if min(astuple(self)[:_TERMS]) < 0 or self.step_s + self.prefill_token_s <= 0 or self.speedup <= 0:
            raise ConfigError("timing: coefficients must not be negative, a step must take time and speedup must be above 0")

    def seconds(self, batch: BatchShape) -> float:
        """Seconds of one step with this batch."""
        return (
            self.step_s
            + self.prefill_token_s * batch.prefill_tokens
            + self.attention_pair_s * batch.attention_pairs
            + self.decode_sequence_s * batch.decode_sequences
            + self.context_token_s * batch.context_tokens
        ) / self.speedup


class ProfilePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured step."""

    seconds: float
    prefill_tokens: int = 0
    attention_pairs: float = 0.0
    decode_sequences: int = 0
    context_tokens: int = 0

    def features(self) -> tuple[float, ...]:
        """The five factors of the model."""
        return (1.0, self.prefill_tokens, self.attention_pairs, self.decode_sequences, self.context_tokens)


def load_profile(path: Path, speedup: float = 1.0) -> StepTiming:
    """Fits the model to a JSON list of profile points. Raises ConfigError if it can't be read or holds fewer than five."""
    try:
        points = msgspec.json.decode(path.read_bytes(), type=list[ProfilePoint])
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigError(f"profile {path} can't be read ({exc}): give a JSON list of steps as tandem_worker/mock/timing.py says") from exc
    return fit(points, speedup)


def fit(points: list[ProfilePoint], speedup: float = 1.0) -> StepTiming:
    """Non-negative least squares of relative errors. Raises ConfigError for fewer points than coefficients."""
    if len(points) < _TERMS:
        raise ConfigError(f"a profile needs {_TERMS} steps or more, got {len(points)}: measure prefills and decodes of several sizes")
    seconds = np.array([point.seconds for point in points])
    if seconds.min() <= 0:
        raise ConfigError("a profile point has seconds <= 0: every step takes time")
    features = np.array([point.features() for point in points]) / seconds[:, None]
    step, token, pair, sequence, context = _non_negative(features).tolist()
    return StepTiming(step, token, pair, sequence, context, speedup)


def _non_negative(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least squares against ones; terms that come out negative are dropped, most negative first, until none is."""
    scale = np.maximum(np.abs(features).max(axis=0), 1e-300)
    kept = list(range(features.shape[1]))
    solution = np.zeros(features.shape[1])
    while kept:
        found = np.linalg.lstsq(features[:, kept] / scale[kept], np.ones(len(features)), rcond=None)[0]
        if found.min() >= 0:
            solution[kept] = found / scale[kept]
            break
        kept.pop(int(found.argmin()))
    return solution
