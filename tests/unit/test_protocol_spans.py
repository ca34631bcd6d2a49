# SPDX-License-Identifier: Apache-2.0
"""Spans: off and free unless asked for; exported over OTLP, under the trace that a request brought."""

import time
from collections.abc import Iterator

import pytest

from spans import Collector
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.spans import NoSpans, TraceSettings, carried, load_settings, open_spans

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-00"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Takes spans until the end."""
    with Collector() as running:
        yield running


def request() -> GenerationRequest:
    """One with a trace."""
    return GenerationRequest(request_id="r", prompt=[1], images=(), stream=True, prepend_input=False, sampling={}, returns=frozenset(),
                             handoff=None, priority=0, timeout_s=None, trace=PARENT)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, TraceSettings(endpoint="http://localhost:4317")),
     ({"OTEL_EXPORT_ENABLED": "1"}, TraceSettings(True, endpoint="http://localhost:4317")),
     ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:1"}, TraceSettings(True, endpoint="http://c:1")),
     ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:1", "OTEL_EXPORT_ENABLED": "false"}, TraceSettings(False, endpoint="http://c:1")),
     ({"OTEL_EXPORT_ENABLED": "1", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "chat"},
      TraceSettings(True, "http/protobuf", "http://localhost:4318/v1/traces", "chat"))],
)
def test_settings(variables: dict[str, str], expected: TraceSettings) -> None:
    """An endpoint is enough; Dynamo's switch alone takes the usual one."""
    assert load_settings(variables) == expected


@pytest.mark.parametrize("variables", [{"OTEL_EXPORT_ENABLED": "perhaps"}, {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}])
def test_wrong_settings_are_refused(variables: dict[str, str]) -> None:
    """With the variable's name."""
    with pytest.raises(ConfigError, match=next(iter(variables))):
        load_settings(variables)


def test_without_settings_a_request_is_passed_on_as_it_came() -> None:
    """The very object: nothing is copied."""
    spans, asked = open_spans("router", TraceSettings()), request()
    assert isinstance(spans, NoSpans)
    span = spans.begin("router.request", asked.trace, request_id="r")
    with span.child("router.generate") as child:
        assert carried(asked, child) is asked
    span.event("first_token")
    span.end("internal")
    spans.close()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_spans_lie_under_each_other_and_under_the_clients(collector: Collector, protocol: str) -> None:
    """What is sent on names the span that sends it; outcome, attributes and events are told."""
    settings = TraceSettings(True, protocol, collector.url if protocol == "http/protobuf" else collector.grpc_url)
    spans = open_spans("router", settings)
    whole = spans.begin("router.request", PARENT, request_id="r1")
    with whole.child("router.generate", worker="w0") as part:
        sent = carried(request(), part)
    whole.event("first_token")
    whole.end("unavailable")
    whole.end("ok")
    spans.close()
    told = {span.name: span for span in collector.spans}
    assert set(told) == {"router.request", "router.generate"}
    assert {span.trace_id.hex() for span in told.values()} == {TRACE_ID}
    assert told["router.request"].parent_span_id.hex() == "00f067aa0ba902b7"
    assert told["router.generate"].parent_span_id == told["router.request"].span_id
    assert sent.trace["traceparent"] == f"00-{TRACE_ID}-{told['router.generate'].span_id.hex()}-01"
    attributes = {pair.key: pair.value.string_value for pair in told["router.request"].attributes}
    assert (attributes["request_id"], attributes["outcome"]) == ("r1", "unavailable")
    assert [event.name for event in told["router.request"].events] == ["first_token"]
    assert told["router.request"].status.code == 2
    assert collector.services == {"router"}


def test_an_exception_is_the_error_of_the_part_it_ends(collector: Collector) -> None:
    """And goes on its way."""
    spans = open_spans("router", TraceSettings(True, "http/protobuf", collector.url))
    whole = spans.begin("router.request", {})
    with pytest.raises(UnavailableError), whole.child("router.prefill"):
        raise UnavailableError("gone")
    whole.end()
    spans.close()
    told = {span.name: span.status.code for span in collector.spans}
    assert told == {"router.prefill": 2, "router.request": 0}


def test_a_trace_that_its_client_does_not_record_is_passed_on_and_not_exported(collector: Collector) -> None:
    """Its flag says so."""
    spans = open_spans("router", TraceSettings(True, "http/protobuf", collector.url))
    span = spans.begin("router.request", UNSAMPLED)
    assert span.headers["traceparent"].startswith(f"00-{TRACE_ID}-")
    assert span.headers["traceparent"].endswith("-00")
    span.end()
    spans.close()
    assert collector.spans == []


def test_a_collector_that_is_away_holds_nobody_up() -> None:
    """Neither a request nor the end."""
    spans = open_spans("router", TraceSettings(True, "http/protobuf", "http://127.0.0.1:9/v1/traces"))
    started = time.monotonic()
    for _ in range(5000):
        spans.begin("router.request", {}).end()
    assert time.monotonic() - started < 5
    spans.close()
    assert time.monotonic() - started < 15
