# SPDX-License-Identifier: Apache-2.0
"""How long one request took, as its client saw it, over all its legs: when it was taken, its first token, the gaps, its end.

On the router's event loop, once per response of a worker. Tokens of one response came together, so that the gap before it is divided
among them. A request that isn't streamed has one response: neither a time to its first token nor gaps can be told from it.
"""

from dataclasses import dataclass

from tandem_protocol import tensors
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Arrays
from tandem_protocol.tallies import Tally


@dataclass(frozen=True)
class RequestTallies:
    """The histograms of one model: seconds, and tokens."""

    time_to_first_token: Tally
    inter_token_latency: Tally
    request_duration: Tally
    input_tokens: Tally
    output_tokens: Tally
    cached_tokens: Tally


class RequestMeter:
    """One request. Times are readings of one clock in seconds."""

    __slots__ = ("_isl", "_last", "_sequences", "_started", "_streamed", "_tallies", "_tokens")

    def __init__(self, started: float, *, streamed: bool, sequences: int) -> None:
        self._started, self._streamed, self._sequences = started, streamed, sequences
        self._tallies: RequestTallies | None = None
        self._isl = 0
        self._last = started
        self._tokens = 0

    @property
    def waiting(self) -> bool:
        """Whether no token has come yet."""
        return self._tokens == 0

    def begin(self, tallies: RequestTallies, isl: int) -> None:
        """The prompt's length in tokens and the model are known."""
        self._tallies, self._isl = tallies, isl

    def received(self, tokens: int, cached: int, now: float) -> None:
        """A response came with so many tokens over all sequences; `cached` ones of the prompt had not to be computed."""
        if self._tallies is None or tokens == 0:
            return
        if self._tokens == 0:
            self._first(self._tallies, cached, now)
        elif self._streamed:
            self._tallies.inter_token_latency.observe((now - self._last) * self._sequences / tokens, tokens)
        self._last = now
        self._tokens += tokens

    def ended(self, now: float) -> None:
        """It is over, however it ended; a request without a token counts nowhere here."""
        if self._tallies is not None and self._tokens:
            self._tallies.request_duration.observe(now - self._started)
            self._tallies.output_tokens.observe(self._tokens)

    def _first(self, tallies: RequestTallies, cached: int, now: float) -> None:
        if self._streamed:
            tallies.time_to_first_token.observe(now - self._started)
        tallies.input_tokens.observe(self._isl)
        tallies.cached_tokens.observe(cached)


def sequences_of(request: GenerationRequest) -> int:
    """How many answers are generated side by side; 1 also for what the worker will refuse."""
    wanted = request.sampling.get("n")
    return wanted if isinstance(wanted, int) and wanted > 0 else 1


def count_tokens(arrays: Arrays) -> int:
    """Generated tokens in a response, over all sequences."""
    ids = arrays.get(tensors.OUTPUT_IDS)
    if ids is not None:
        return len(ids)
    counts = arrays.get(tensors.NUM_OUTPUT_TOKENS)
    return 0 if counts is None else int(counts.sum())


def cached_of(arrays: Arrays, predicted: int) -> int:
    """What the worker says was cached, where the client asked for that, else what the index said."""
    told = arrays.get(tensors.NUM_CACHED_TOKENS)
    return predicted if told is None else int(told[0])
