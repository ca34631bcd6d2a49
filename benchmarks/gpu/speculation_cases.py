# SPDX-License-Identifier: Apache-2.0
"""What is compared in the GPU run of speculative decoding: its cases, its prompts, and when a case has passed. Pure."""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu.greedy_texts import Difference

LEAST_DRAFT_ACCEPTANCE = 0.9
"""Of guesses by the target's own checkpoint, after a handoff, too: all were, on CPUs and on an H200."""
REPEATED = "The red lamp stands by the green door, the blue boat waits at the old pier, and the tall clock strikes nine. "
QUESTIONS = ("List the days of the week, five times.", "Count from one to forty in words.", "Why is the sky blue?",
             "Repeat the word harbour twenty times.", "Tell a story about a violin and a river.")


@dataclass(frozen=True)
class Case:
    """One server: how it is started and where it is asked."""

    name: str
    mode: str
    model: str
    """The Triton model that is asked."""
    decoder: str
    """The worker that counts guesses."""
    speculative: dict[str, Any] | None
    least_acceptance: float | None = 0.0
    """Accepted over guessed tokens, of which at least one must be accepted; None: guesses are random, and need only be made."""

    @property
    def padding(self) -> int:
        """Tokens per answer that vLLM counts as guessed and refused, though nobody guessed them: it pads the first step after a handoff."""
        return int(self.speculative["num_speculative_tokens"]) if self.speculative and self.mode == "disagg" else 0


@dataclass(frozen=True)
class Guesses:
    """The decoding worker's counters."""

    drafts: float
    """Times that it guessed; each makes one token besides the accepted ones."""
    drafted: float
    """Tokens guessed."""
    accepted: float

    def since(self, before: "Guesses") -> "Guesses":
        """What was added."""
        return Guesses(self.drafts - before.drafts, self.drafted - before.drafted, self.accepted - before.accepted)

    def without(self, padded: int, tokens: int) -> "Guesses":
        """Less so many steps of `tokens` padded tokens each."""
        return Guesses(self.drafts - padded, self.drafted - padded * tokens, self.accepted) if tokens else self

    @property
    def acceptance(self) -> float:
        """Accepted over guessed; 0 without guesses."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def accept_length(self) -> float:
        """Tokens per guess, with the one that the target adds; 1 without guesses."""
        return 1.0 + self.accepted / self.drafts if self.drafts else 1.0


@dataclass(frozen=True)
class Outcome:
    """One case as measured."""

    case: str
    output_tokens: int
    wall_s: float
    guesses: Guesses | None
    """Those that were made, without padding."""
    least_acceptance: float | None
    differing: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """Whether texts are equal but for ties, and guesses are made and accepted."""
        equal = all(difference.is_tie for difference in self.differing)
        return equal and self.output_tokens > 0 and (self.guesses is None or self._guessed_well(self.guesses))

    def _guessed_well(self, guesses: Guesses) -> bool:
        if self.least_acceptance is None:
            return guesses.drafted > 0
        return guesses.accepted > 0 and guesses.acceptance >= self.least_acceptance

    def report(self, plain: "Outcome") -> dict[str, Any]:
        """For the JSON line; `plain` is what it stands beside."""
        speed, beside = self.output_tokens / self.wall_s, plain.output_tokens / plain.wall_s
        guesses = self.guesses and {**asdict(self.guesses), "acceptance": round(self.guesses.acceptance, 4),
                                    "accept_length": round(self.guesses.accept_length, 3)}
        return {"case": self.case, "passed": self.passed, "output_tokens": self.output_tokens, "wall_s": round(self.wall_s, 3),
                "tokens_per_s": round(speed, 1), "times_plain": round(speed / beside, 3), "guesses": guesses,
                "differing": [{**asdict(one), "is_tie": one.is_tie} for one in self.differing]}


def cases(draft: str, head: str, tokens: int) -> dict[str, Case]:
    """All cases; `draft` and `head` are the folders of the draft's checkpoint and of an Eagle3 head; `tokens` are guessed at once."""
    ngram = {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    own = {"method": "draft_model", "model": draft, "num_speculative_tokens": tokens}
    eagle3 = {"method": "eagle3", "model": head, "num_speculative_tokens": tokens}
    every = (
        Case("plain", "agg", "vllm", "vllm", None),
        Case("ngram", "agg", "vllm", "vllm", ngram),
        Case("draft_model", "agg", "vllm", "vllm", own, LEAST_DRAFT_ACCEPTANCE),
        Case("disagg", "disagg", "disagg", "decode", own, LEAST_DRAFT_ACCEPTANCE),
        Case("disagg_ngram", "disagg", "disagg", "decode", ngram),
        Case("eagle3", "agg", "vllm", "vllm", eagle3, None),
        Case("disagg_eagle3", "disagg", "disagg", "decode", eagle3, None),
    )
    return {case.name: case for case in every}


def prompts(count: int) -> list[str]:
    """Half that repeat themselves, which n-grams are good at, half questions."""
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [f"{i}. {REPEATED * 6}" if i % 2 else chat.format(f"{QUESTIONS[i // 2 % len(QUESTIONS)]} ({i})") for i in range(count)]
