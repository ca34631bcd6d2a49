# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for vLLM's outputs, Triton's sender and requests, and the engine host; typed like what they stand in for."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_protocol.errors import RequestError, TandemError, UnavailableError
from tandem_protocol.requests import TensorReader
from tandem_protocol.roles import Role
from tandem_protocol.streams import Outbox, ResponseStream
from tandem_worker.responses import Arrays
from tandem_worker.status import WorkerState, WorkerStatus

WAIT_S = 30.0
"""Bound of every wait in a test; only a failing test reaches it."""


def reader(tensors: Mapping[str, Any]) -> TensorReader:
    """Reads a request's tensors from a dict: lists become arrays, strings and bytes become one-element object arrays."""
    arrays = {name: _array(value) for name, value in tensors.items()}
    return arrays.get


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    items = value if isinstance(value, list) else [value]
    is_text = any(isinstance(item, str | bytes) for item in items)
    return np.asarray([item.encode() if isinstance(item, str) else item for item in items], dtype=np.object_ if is_text else None)


@dataclass
class FakeLogprob:
    """vLLM's Logprob."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass
class FakeSequence:
    """vLLM's CompletionOutput."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, FakeLogprob]] | None = None
    finish_reason: str | None = None


@dataclass
class FakeOutput:
    """vLLM's RequestOutput, with its way of merging deltas."""

    outputs: list[FakeSequence] = field(default_factory=list)
    finished: bool = False
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    kv_transfer_params: dict[str, Any] | None = None

    def add(self, next_output: "FakeOutput", aggregate: bool) -> None:
        """Appends a later delta."""
        assert aggregate
        self.finished |= next_output.finished
        for later in next_output.outputs:
            own = next((sequence for sequence in self.outputs if sequence.index == later.index), None)
            if own is None:
                self.outputs.append(later)
                continue
            own.text += later.text
            own.token_ids.extend(later.token_ids)
            own.finish_reason = later.finish_reason


def delta(text: str, *, finished: bool = False) -> FakeOutput:
    """One delta of a request with one sequence."""
    return FakeOutput([FakeSequence(text=text, finish_reason="stop" if finished else None)], finished=finished)


def encode_text(output: FakeOutput) -> Arrays:
    """The simplest encoder: the text of the first sequence."""
    return {"text": np.asarray([output.outputs[0].text.encode()], dtype=np.object_)}


class RecordingSink:
    """Records what it is given, as `("send", text, final)` and `("fail", message, True)`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bool]] = []

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """Records one response."""
        self.calls.append(("send", b"".join(arrays["text"]).decode(), final))

    def fail(self, error: TandemError) -> None:
        """Records an error."""
        self.calls.append(("fail", str(error), True))

    def is_cancelled(self) -> bool:
        """No client ever goes away here."""
        return False

    @property
    def text(self) -> str:
        """Everything that was sent."""
        return "".join(text for kind, text, _ in self.calls if kind == "send")


class HeldSink(RecordingSink):
    """Holds its first response until `release` is set; `entered` tells that the sender is in there."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.release = threading.Event()

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """Waits, then records."""
        self.entered.set()
        assert self.release.wait(WAIT_S)
        super().send(arrays, final=final)


class BrokenSink(RecordingSink):
    """A sink whose stream Triton has closed already."""

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """Fails as Triton's sender does."""
        raise RuntimeError("the response sender is closed")

    def fail(self, error: TandemError) -> None:
        """Fails in the same way."""
        raise RuntimeError("the response sender is closed")


class ManualOutbox(Outbox):
    """An outbox without a thread: the test says when the sender gets its turn."""

    def __init__(self) -> None:
        self.ready: list[ResponseStream] = []

    def put(self, stream: ResponseStream) -> None:
        """Remembers the stream."""
        self.ready.append(stream)

    def send_one(self) -> None:
        """One turn of the sender, if there is something to do."""
        if self.ready:
            self.ready.pop(0).flush()

    def send_all(self) -> None:
        """Turns until nothing is left."""
        while self.ready:
            self.send_one()


@dataclass
class FakeHost:
    """An engine host that knows the requests in `active` and records what the admin server asks of it."""

    state: WorkerState = WorkerState.READY
    active: list[str] = field(default_factory=list)
    drained: list[float] = field(default_factory=list)

    def status(self) -> WorkerStatus:
        """A snapshot."""
        return WorkerStatus(self.state, Role.DECODE, len(self.active), 1, 2, 0.5, 0.01)

    async def abort(self, request_id: str) -> int:
        """Forgets the requests with this id."""
        before = len(self.active)
        self.active = [one for one in self.active if one != request_id]
        return before - len(self.active)

    async def drain(self, timeout_s: float) -> int:
        """Forgets all requests."""
        self.drained.append(timeout_s)
        aborted, self.active = len(self.active), []
        return aborted

    async def kvbm(self, command: str, tier: str) -> dict[str, Any]:
        """A worker with a host tier that is stuck, a disk tier, and no other."""
        if tier == "G4":
            raise RequestError("the engine refused: this engine has no tier G4")
        if tier == "G2":
            raise UnavailableError("the engine did not answer")
        return {"command": command, "tier": tier}
