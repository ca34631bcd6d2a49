# SPDX-License-Identifier: Apache-2.0
"""What a follower says to its leader: JSON texts over one WebSocket on the leader's admin port, whose end is the end of both.

vLLM itself tells neither side: a front end doesn't notice that an engine on another host was killed, nor such an engine that its
front end is gone.
"""

import msgspec

PATH = "/followers"
FIGURES_INTERVAL_S = 1.0
"""As often as the leader looks whether a rank stands still."""
BEAT_SHARE = 1.5
"""aiohttp asks after one interval of silence and waits half of one for the answer; so the interval is the patience over this."""


class Joining(msgspec.Struct, frozen=True, tag=True):
    """The first message: which ranks are here, and the ports of the first one's KV events (0: none are published)."""

    first: int
    count: int
    event_port: int
    replay_port: int


class Figures(msgspec.Struct, frozen=True, tag=True):
    """Once a second: seconds of processor time that each rank's engine has used, in the order of the ranks."""

    cpu_s: tuple[float, ...]


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The leader's answer to Joining; a refusal is a close with the reason."""


def beat_s(patience_s: float) -> float | None:
    """The interval of pings after which a peer that stands still is noticed within `patience_s`; None for 0, which never notices."""
    return patience_s / BEAT_SHARE if patience_s else None


def ranks_text(first: int, count: int) -> str:
    """For people."""
    return f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
