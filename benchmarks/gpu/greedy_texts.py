# SPDX-License-Identifier: Apache-2.0
"""Whether two greedy answers are the same, but for choices between tokens that the reference holds for equally likely.

Such a choice is up to the order of additions, which differs with the shape of a batch; what comes after it differs rightly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TIE_LOGPROB = 1e-3
"""Tokens whose log-probabilities differ by less are tied, in float32."""


@dataclass(frozen=True)
class Reference:
    """A greedy answer with what the engine held for likely at each of its tokens."""

    ids: tuple[int, ...]
    likely: tuple[Mapping[int, float], ...]
    """Per token of `ids`: the log-probability of each likely token id, the chosen one among them."""


@dataclass(frozen=True)
class Difference:
    """Where an answer first parts from its reference."""

    prompt: int
    position: int
    """Tokens of the answer that are the same before it."""
    gap: float | None
    """By how much the other token is less likely (log-probability); None if it isn't among the likely ones, or an answer is shorter."""

    @property
    def is_tie(self) -> bool:
        """Whether both tokens were equally likely."""
        return self.gap is not None and abs(self.gap) < TIE_LOGPROB


def differences(references: Sequence[Reference], answers: Sequence[Sequence[int]]) -> list[Difference]:
    """The first difference of each answer that has one."""
    found = (_difference(prompt, *pair) for prompt, pair in enumerate(zip(references, answers, strict=True)))
    return [one for one in found if one is not None]


def _difference(prompt: int, reference: Reference, answer: Sequence[int]) -> Difference | None:
    for position, (ours, theirs) in enumerate(zip(reference.ids, answer, strict=False)):
        if ours != theirs:
            likely = reference.likely[position]
            gap = likely[ours] - likely[theirs] if ours in likely and theirs in likely else None
            return Difference(prompt, position, gap)
    same = min(len(reference.ids), len(answer))
    return None if len(reference.ids) == len(answer) else Difference(prompt, same, None)
