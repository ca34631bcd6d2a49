# SPDX-License-Identifier: Apache-2.0
"""Seeded prompts of a given length whose first words all differ, so that no request hits another's prefix cache."""

import hashlib
import random

_NOUNS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place "
    "case week company system program question work government number night point home water room mother area money story fact "
    "month lot right study book eye job word business issue side kind head house service friend father power hour game line end "
    "member law car city community name president team minute idea body information back parent face others level office door "
    "health person art war history party result change morning reason research girl guy moment air teacher force education"
)
WORDS = tuple(_NOUNS.split())
"""Common English nouns: about one token each, so that a prompt's length in words is close to its length in tokens."""


def make_prompts(seed: str, count: int, words: int) -> tuple[str, ...]:
    """`count` prompts of `words` words each; the same for the same seed.

    The first word is unique within the seed and, by a hash of it, among seeds. Prefix caches chain block hashes from the
    first token on, so a different first word leaves nothing to share.
    """
    digest = hashlib.sha256(seed.encode()).hexdigest()[:8]
    chooser = random.Random(seed)
    return tuple(" ".join([f"{digest}-{index}", *chooser.choices(WORDS, k=words - 1)]) for index in range(count))
