# SPDX-License-Identifier: Apache-2.0
"""What the sink tells Triton, by a sender that keeps it: with which response the end goes."""

import importlib
import io
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tandem_protocol.errors import RequestError

FINAL = 1


@dataclass
class Response:
    """As Triton's."""

    tensors: list[Any]
    error: Any = None


@dataclass
class TritonError:
    """As Triton's."""

    INVALID_ARG = 3
    message: str
    code: int


@dataclass
class Sender:
    """Keeps (has a response, flags), and how often it was asked."""

    sent: list[tuple[bool, int]] = field(default_factory=list)
    asked: int = 0

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        """One message."""
        assert not self.sent or self.sent[-1][1] != FINAL, "after the end"
        self.sent.append((response is not None, flags))

    def is_cancelled(self) -> bool:
        """Crashes tritonserver after the end."""
        self.asked += 1
        return False


@pytest.fixture
def sinks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The sink's class, over a double of the module that only exists inside tritonserver."""
    double = types.SimpleNamespace(InferenceResponse=Response, Tensor=lambda name, array: (name, array), TritonError=TritonError,
                                   TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL, TritonModelException=RuntimeError)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", double)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "tandem_protocol.triton", raising=False)
    yield importlib.import_module("tandem_protocol.triton").TritonSink
    sys.modules.pop("tandem_protocol.triton", None)


ARRAYS = {"output_ids": np.zeros(1, np.uint32)}


def test_the_end_of_a_good_stream_goes_by_itself(sinks: Any) -> None:
    """After its last tokens."""
    sender = Sender()
    sink = sinks(sender)
    sink.send(ARRAYS, final=False)
    sink.send(ARRAYS, final=True)
    assert sender.sent == [(True, 0), (True, 0), (False, FINAL)]


def test_the_one_response_of_a_model_that_is_not_decoupled_is_its_end(sinks: Any) -> None:
    """Its call has no place for another message."""
    sender = Sender()
    sinks(sender, decoupled=False).send(ARRAYS, final=True)
    assert sender.sent == [(True, FINAL)]


@pytest.mark.parametrize("decoupled", [True, False])
def test_an_error_is_the_end(sinks: Any, decoupled: bool) -> None:
    """Of a stream with true statuses it is what ends it."""
    sender = Sender()
    sinks(sender, decoupled=decoupled).fail(RequestError("no"))
    assert sender.sent == [(True, FINAL)]


def test_after_the_end_triton_is_not_asked_about_the_client(sinks: Any) -> None:
    """The answer is no."""
    sender = Sender()
    sink = sinks(sender)
    assert not sink.is_cancelled()
    sink.send(ARRAYS, final=True)
    assert not sink.is_cancelled()
    assert sender.asked == 1


@pytest.mark.parametrize("ends", [lambda sink: sink.send(ARRAYS, final=True), lambda sink: sink.fail(RequestError("no"))])
def test_after_the_end_nothing_keeps_tritons_sender(sinks: Any, ends: Any) -> None:
    """Whoever keeps the sink, in a traceback for instance."""
    sender = Sender()
    sink, alive = sinks(sender), weakref.ref(sender)
    ends(sink)
    del sender
    assert alive() is None
    assert not sink.is_cancelled()


def test_lines_of_libraries_can_be_written_whatever_is_in_them(sinks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python thinks that its streams are ASCII, and even for what no encoding knows."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    sys.modules[sinks.__module__].configure_logging("m")
    for stream in streams.values():
        stream.write("a dash \u2014 and half a pair \udc80")
        stream.flush()
        assert stream.buffer.getvalue() == b"a dash \xe2\x80\x94 and half a pair \\udc80"  # type: ignore[attr-defined]
