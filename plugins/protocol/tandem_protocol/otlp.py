# SPDX-License-Identifier: Apache-2.0
"""Spans that are exported over OTLP. The only module of the protocol that knows opentelemetry.

A thread of the SDK's sends them in batches. A collector that is away costs spans, never requests: the SDK's queue holds 2,048 and drops
what comes beyond that, with a warning in the log. The provider is ours alone, since vLLM sets the global one.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tandem_protocol.spans import Span, TraceSettings, Value
from tandem_protocol.version import VERSION

_EXPORT_TIMEOUT_S = 5
_CLOSE_TIMEOUT_S = 5.0
_FORMAT = TraceContextTextMapPropagator()


class OtlpSpan:
    """A span of the SDK's."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span
        self._context = trace.set_span_in_context(span)
        self.headers: Mapping[str, str] = _injected(self._context)

    def child(self, name: str, **attributes: Value) -> AbstractContextManager[Span]:
        """A part of it that another process works on, or waits for."""
        return self._child(OtlpSpan(self._tracer, self._tracer.start_span(name, self._context, SpanKind.CLIENT, attributes)))

    def event(self, name: str) -> None:
        """Something happened just now."""
        self._span.add_event(name)

    def end(self, outcome: str = "ok") -> None:
        """It is over."""
        if self._span.is_recording():
            self._span.set_attribute("outcome", outcome)
            if outcome != "ok":
                self._span.set_status(StatusCode.ERROR, outcome)
            self._span.end()

    @contextlib.contextmanager
    def _child(self, child: "OtlpSpan") -> Iterator[Span]:
        try:
            yield child
        except BaseException as exc:
            child.end(type(exc).__name__)
            raise
        child.end()


class OtlpSpans:
    """Makes spans and exports them. Resource handling: `close` ends the SDK's thread."""

    def __init__(self, settings: TraceSettings, process: str) -> None:
        names = {"service.name": settings.service or process, "service.instance.id": f"{socket.gethostname()}/{process}"}
        self._provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(settings)))
        self._tracer = self._provider.get_tracer("tandem", VERSION)

    def begin(self, name: str, trace: Mapping[str, str], **attributes: Value) -> Span:
        """A span under the trace of these headers; without any it begins a trace."""
        return OtlpSpan(self._tracer, self._tracer.start_span(name, _FORMAT.extract(trace), SpanKind.SERVER, attributes))

    def close(self) -> None:
        """Exports what is left; a collector that doesn't answer is given up."""
        closing = threading.Thread(target=self._provider.shutdown, name="tandem-otlp-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_TIMEOUT_S)


def _injected(context: Context) -> Mapping[str, str]:
    headers: dict[str, str] = {}
    _FORMAT.inject(headers, context)
    return headers


def _exporter(settings: TraceSettings) -> SpanExporter:
    if settings.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=settings.endpoint, insecure=not settings.endpoint.startswith("https://"), timeout=_EXPORT_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=settings.endpoint, timeout=_EXPORT_TIMEOUT_S)
