# SPDX-License-Identifier: Apache-2.0
"""Which trace context is passed on, and which is as good as none."""

import pytest

from tandem_protocol.trace import split_trace, trace_id_of

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


def test_trace_headers_are_taken_out_of_the_parameters() -> None:
    """What is left may be sampling parameters, which a traceparent must not be."""
    parameters = {"traceparent": PARENT, "tracestate": "vendor=1", "temperature": 0.5}
    assert split_trace(parameters) == ({"traceparent": PARENT, "tracestate": "vendor=1"}, {"temperature": 0.5})
    assert trace_id_of({"traceparent": PARENT}) == TRACE_ID


@pytest.mark.parametrize("parent", ["", "x", TRACE_ID, f"ff-{TRACE_ID}-00f067aa0ba902b7-01", f"00-{'0' * 32}-00f067aa0ba902b7-01",
                                    f"00-{TRACE_ID}-{'0' * 16}-01", PARENT.upper(), f"{PARENT}-more", f"{PARENT}\n"])
def test_a_malformed_parent_is_dropped_with_its_state(parent: str) -> None:
    """As the specification asks; the request is served all the same."""
    assert split_trace({"traceparent": parent, "tracestate": "vendor=1", "n": 1}) == ({}, {"n": 1})
    assert trace_id_of({"traceparent": parent}) == ""


@pytest.mark.parametrize("state", ["", "v" * 513])
def test_a_state_without_sense_is_left_out(state: str) -> None:
    """Beyond 512 characters nobody need pass it on."""
    assert split_trace({"traceparent": PARENT, "tracestate": state}) == ({"traceparent": PARENT}, {})


def test_without_a_trace_nothing_changes() -> None:
    """The usual case."""
    assert split_trace({"temperature": 0.5}) == ({}, {"temperature": 0.5})
    assert trace_id_of({}) == ""
