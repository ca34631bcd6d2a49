# SPDX-License-Identifier: Apache-2.0
"""What is counted of embeddings that engines hand over. Without vLLM: the connector gives it vLLM's form."""

from collections import Counter

COUNTERS = {
    "embeddings_offered": "Images of an encode worker's requests whose embeddings were there for others when the request ended",
    "embeddings_lost": "Images of an encode worker's requests that left no embedding: too large for the folder, or it can't be written",
    "embeddings_loaded": "Images whose embedding was taken from an encode worker",
    "embeddings_missed": "Images that a consumer encoded by itself, since nobody had left an embedding",
    "embedding_bytes_loaded": "Bytes of loaded embeddings",
}


class EmbeddingCounters:
    """Since the last `take`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def ended(self, *, is_there: bool) -> None:
        """One image of an encode worker's request that ended."""
        self._counts["embeddings_offered" if is_there else "embeddings_lost"] += 1

    def loaded(self, size: int) -> None:
        """One embedding of so many bytes."""
        self._counts.update(embeddings_loaded=1, embedding_bytes_loaded=size)

    def missed(self) -> None:
        """One image without an embedding."""
        self._counts["embeddings_missed"] += 1

    def take(self) -> dict[str, int]:
        """All counts that are not 0, and begins anew."""
        taken, self._counts = dict(self._counts), Counter()
        return taken
