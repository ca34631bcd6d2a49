# SPDX-License-Identifier: Apache-2.0
"""The way of responses from the event loop to Triton."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import WAIT_S, BrokenSink, FakeOutput, HeldSink, ManualOutbox, RecordingSink, delta, encode_text
from tandem_protocol.errors import EngineError, RequestError
from tandem_protocol.streams import Outbox, ResponseStream
from tandem_worker.responses import Arrays


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    """A real outbox with its thread."""
    real = Outbox()
    yield real
    real.close(WAIT_S)


def stream_to(sink: RecordingSink, outbox: Outbox) -> ResponseStream:
    """A stream that sends text."""
    stream = ResponseStream(sink, outbox)
    stream.encode = encode_text
    return stream


def refuse(_: Any) -> Arrays:
    """An encoder with a bug."""
    raise KeyError("bug")


def test_responses_arrive_in_order(outbox: Outbox) -> None:
    """However they are merged; the last one is final."""
    sink = RecordingSink()
    stream = stream_to(sink, outbox)
    for letter in "abcdef":
        stream.push(delta(letter))
    stream.push(delta("g", finished=True))
    outbox.close(WAIT_S)
    assert sink.text == "abcdefg"
    assert [final for _, _, final in sink.calls].count(True) == 1
    assert sink.calls[-1][2]


def test_outputs_merge_while_the_sender_is_busy(outbox: Outbox) -> None:
    """A slow sender means fewer and larger responses, never a growing queue."""
    sink = HeldSink()
    stream = stream_to(sink, outbox)
    stream.push(delta("a"))
    assert sink.entered.wait(WAIT_S)
    for letter in "bcd":
        stream.push(delta(letter))
    sink.release.set()
    outbox.close(WAIT_S)
    assert sink.calls == [("send", "a", False), ("send", "bcd", False)]


def test_a_stream_waits_in_the_outbox_at_most_once() -> None:
    """So the outbox holds no more than there are streams."""
    outbox = ManualOutbox()
    stream = stream_to(RecordingSink(), outbox)
    for letter in "abc":
        stream.push(delta(letter))
    assert outbox.ready == [stream]


def test_streams_take_turns() -> None:
    """None waits for another's second response."""
    outbox = ManualOutbox()
    sinks = [RecordingSink(), RecordingSink()]
    streams = [stream_to(sink, outbox) for sink in sinks]
    for _ in range(2):
        for stream in streams:
            stream.push(delta("x"))
    assert outbox.ready == streams


def test_an_error_comes_after_what_was_pushed_before() -> None:
    """The client keeps the tokens that it is owed."""
    outbox, sink = ManualOutbox(), RecordingSink()
    stream = stream_to(sink, outbox)
    stream.push(delta("a"))
    stream.fail(RequestError("no"))
    outbox.send_all()
    assert sink.calls == [("send", "a", False), ("fail", "no", True)]


def test_an_error_alone_needs_no_encoder() -> None:
    """A request may be refused before anybody knows how to encode it."""
    outbox, sink = ManualOutbox(), RecordingSink()
    ResponseStream(sink, outbox).fail(RequestError("no"))
    outbox.send_all()
    assert sink.calls == [("fail", "no", True)]


@pytest.mark.parametrize("flush_between", [True, False])
def test_nothing_follows_the_last_output(flush_between: bool) -> None:
    """Neither an output nor an error."""
    outbox, sink = ManualOutbox(), RecordingSink()
    stream = stream_to(sink, outbox)
    stream.push(delta("a", finished=True))
    if flush_between:
        outbox.send_all()
    stream.push(delta("b"))
    stream.fail(RequestError("no"))
    outbox.send_all()
    assert sink.calls == [("send", "a", True)]


def test_nothing_follows_an_error() -> None:
    """Neither an output nor a second error."""
    outbox, sink = ManualOutbox(), RecordingSink()
    stream = stream_to(sink, outbox)
    stream.fail(RequestError("no"))
    stream.fail(RequestError("again"))
    stream.push(delta("b", finished=True))
    outbox.send_all()
    assert sink.calls == [("fail", "no", True)]


def test_an_encoders_bug_ends_its_own_stream_only(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    """The client gets an error, the other streams their responses."""
    broken, fine = RecordingSink(), RecordingSink()
    failing, other = ResponseStream(broken, outbox), stream_to(fine, outbox)
    failing.encode = refuse
    with caplog.at_level(logging.CRITICAL):
        failing.push(delta("a"))
        other.push(delta("b", finished=True))
        outbox.close(WAIT_S)
    assert broken.calls == [("fail", "the response could not be encoded: 'bug'", True)]
    assert fine.calls == [("send", "b", True)]


def test_a_stream_whose_encoder_failed_stays_closed() -> None:
    """The engine may go on for a while until it is aborted."""
    outbox, sink = ManualOutbox(), RecordingSink()
    stream = ResponseStream(sink, outbox)
    stream.encode = refuse
    stream.push(delta("a"))
    outbox.send_all()
    stream.encode = encode_text
    stream.push(delta("b", finished=True))
    outbox.send_all()
    assert len(sink.calls) == 1


def test_an_encoders_own_error_is_passed_on_as_it_is() -> None:
    """It already is a sentence for the client."""

    def no_handoff(_: FakeOutput) -> Arrays:
        raise EngineError("prefill finished without a handoff")

    outbox, sink = ManualOutbox(), RecordingSink()
    stream = ResponseStream(sink, outbox)
    stream.encode = no_handoff
    stream.push(delta("", finished=True))
    outbox.send_all()
    assert sink.calls == [("fail", "prefill finished without a handoff", True)]


def test_a_broken_sink_does_not_end_the_outbox(outbox: Outbox) -> None:
    """Triton closes the stream of a client that went away; all others go on."""
    fine = RecordingSink()
    stream_to(BrokenSink(), outbox).push(delta("a"))
    stream_to(fine, outbox).push(delta("b", finished=True))
    outbox.close(WAIT_S)
    assert fine.calls == [("send", "b", True)]


def test_close_sends_what_is_left(outbox: Outbox) -> None:
    """Nothing in flight is lost at shutdown."""
    held, waiting = HeldSink(), RecordingSink()
    stream_to(held, outbox).push(delta("a"))
    assert held.entered.wait(WAIT_S)
    stream_to(waiting, outbox).push(delta("b", finished=True))
    closing = threading.Thread(target=outbox.close, args=(WAIT_S,))
    closing.start()
    held.release.set()
    closing.join(WAIT_S)
    assert waiting.calls == [("send", "b", True)]


def test_close_gives_up_on_a_sender_that_hangs(outbox: Outbox) -> None:
    """A stub must end even if Triton takes no more responses."""
    held = HeldSink()
    stream_to(held, outbox).push(delta("a"))
    assert held.entered.wait(WAIT_S)
    outbox.close(0)
    held.release.set()


@given(st.lists(st.one_of(st.tuples(st.integers(0, 2), st.text("ab", min_size=1, max_size=3)), st.none()), max_size=30))
def test_any_interleaving_delivers_the_concatenation(steps: list[tuple[int, str] | None]) -> None:
    """A step is an output of one of three streams, or (None) a turn of the sender."""
    outbox, sinks = ManualOutbox(), [RecordingSink() for _ in range(3)]
    streams = [stream_to(sink, outbox) for sink in sinks]
    expected = ["", "", ""]
    for step in steps:
        if step is None:
            outbox.send_one()
            continue
        index, text = step
        expected[index] += text
        streams[index].push(delta(text))
    for stream in streams:
        stream.push(delta("", finished=True))
    outbox.send_all()
    assert [sink.text for sink in sinks] == expected
    assert [[final for _, _, final in sink.calls].index(True) for sink in sinks] == [len(sink.calls) - 1 for sink in sinks]
