# SPDX-License-Identifier: Apache-2.0
"""Seeded prompts of ordinary words, as token ids of the embedded model."""

import random

BLOCK_SIZE = 32
"""Tokens of a KV block on CPUs."""
WORDS = ("river", "stone", "lantern", "harbour", "copper", "winter", "letter", "garden", "signal", "mountain", "paper", "violin")


def make_prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Seeded prompts of `shortest` to `longest` tokens: ids of ordinary text, all different from the first block on."""
    from transformers import AutoTokenizer

    from tandem_cli.serve.embedded_model import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    rng = random.Random(7)
    prompts = []
    for i in range(count):
        length = shortest + (longest - shortest) * i // max(1, count - 1)
        text = f"Chapter {i}. " + " ".join(rng.choice(WORDS) for _ in range(longest))
        prompts.append(list(tokenizer(text)["input_ids"][:length]))
    return prompts
