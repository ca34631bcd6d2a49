# SPDX-License-Identifier: Apache-2.0
"""What was published, by number, and what answers a subscriber's question for it. Pure.

vLLM answers "from `start` on" with what its buffer still holds. So do we, except to "from the beginning" (0) once the buffer doesn't
reach there: then the answer is a dump of the whole state as of some number b, numbered so that it ends at b - 1, and after it
the buffer from b on. Whoever takes it, in a consumer's usual way, has the state of the stream's end and the number that follows. The
dump's frames carry a topic of their own (`DUMP_TOPIC`), by which our router knows that nothing before their first number is missing.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from tandem_kvbm.consolidator import wire
from tandem_kvbm.consolidator.content import Content, everything
from tandem_protocol.event_link import DUMP_TOPIC

FRAME_BLOCKS = 4096
"""Blocks of one frame of a dump, as far as its numbers suffice."""


@dataclass(frozen=True)
class Frame:
    """One numbered payload of an answer."""

    topic: bytes
    seq: int
    payload: bytes


@dataclass(frozen=True)
class Dump:
    """The state before number `end`, in at most `end` payloads."""

    end: int
    payloads: tuple[bytes, ...]


class History:
    """The last payloads, numbered without gaps from 0."""

    def __init__(self, buffer_steps: int) -> None:
        self._payloads: deque[bytes] = deque(maxlen=buffer_steps)
        self.end = 0
        """The number that the next payload gets."""

    @property
    def begin(self) -> int:
        """Number of the oldest payload that is still there; `end` if there is none."""
        return self.end - len(self._payloads)

    def add(self, payload: bytes) -> int:
        """Keeps a payload, and gives it its number."""
        self._payloads.append(payload)
        self.end += 1
        return self.end - 1

    def needs_dump(self, start: int, dump: Dump | None) -> bool:
        """Whether the question can't be answered without a newer dump than that."""
        return start == 0 and self.begin > 0 and (dump is None or dump.end < self.begin)

    def answer(self, start: int, dump: Dump | None) -> Iterator[Frame]:
        """The frames that answer; the buffer's part is that of now."""
        if start == 0 and self.begin > 0 and dump is not None:
            first = dump.end - len(dump.payloads)
            head = [Frame(DUMP_TOPIC, first + at, payload) for at, payload in enumerate(dump.payloads)]
            return iter([*head, *self._since(dump.end)])
        return iter(self._since(start))

    def _since(self, start: int) -> list[Frame]:
        begin = max(start, self.begin)
        return [Frame(b"", begin + at, payload) for at, payload in enumerate(islice(self._payloads, begin - self.begin, None))]


def make_dump(end: int, contents: Iterable[tuple[int, Content]], timestamp_s: float) -> Dump:
    """`contents`: rank and content of each lane, as of number `end`, which is above 0."""
    lanes = list(contents)
    blocks = sum(int(content.table.sizes[0]) * (1 + len(content.units)) for _, content in lanes)
    payloads = tuple(frames(lanes, timestamp_s, max(FRAME_BLOCKS, 2 * blocks // max(1, end - len(lanes)))))
    if len(payloads) > end:
        payloads = tuple(frames(lanes, timestamp_s, 1 << 62))
    return Dump(end, payloads)


def frames(contents: Iterable[tuple[int, Content]], timestamp_s: float, frame_blocks: int = FRAME_BLOCKS) -> Iterator[bytes]:
    """Payloads that make of nothing what the lanes hold."""
    for rank, content in contents:
        gathered: list[wire.Event] = []
        blocks = 0
        for size, event in everything(content):
            gathered.append(event)
            blocks += size
            if blocks >= frame_blocks:
                yield wire.encode(timestamp_s, gathered, rank)
                gathered, blocks = [], 0
        if gathered:
            yield wire.encode(timestamp_s, gathered, rank)
