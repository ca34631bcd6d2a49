# SPDX-License-Identifier: Apache-2.0
"""Spans of router and worker: what a request did when, for those who trace it. Off unless asked for, and free then.

A span is begun under the trace that a request brought (W3C trace context), and what it sends on is its child. `tandem_protocol.otlp`
exports them; without it the null objects here pass the trace on as it came.
"""

import contextlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from tandem_protocol.errors import ConfigError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.settings import parse_bool

ENABLED_VARIABLE = "OTEL_EXPORT_ENABLED"
ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
SERVICE_VARIABLE = "OTEL_SERVICE_NAME"
_PROTOCOLS = ("grpc", "http/protobuf")
_DEFAULT_ENDPOINTS = {"grpc": "http://localhost:4317", "http/protobuf": "http://localhost:4318/v1/traces"}

Value = str | int | float | bool


class Span(Protocol):
    """One piece of work. Any thread may use it; ended once, later ends are nothing."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The trace headers for whoever works for it."""

    def child(self, name: str, **attributes: Value) -> "AbstractContextManager[Span]":
        """A part of it, ended with the block; an exception becomes its error."""

    def event(self, name: str) -> None:
        """Something happened just now."""

    def end(self, outcome: str = "ok") -> None:
        """It is over; anything but `ok` is an error."""


class Spans(Protocol):
    """Where spans come from."""

    def begin(self, name: str, trace: Mapping[str, str], **attributes: Value) -> Span:
        """A span under the trace of these headers; without any it begins a trace."""

    def close(self) -> None:
        """Exports what is left, within a bound."""


@dataclass(frozen=True)
class NoSpan:
    """Nobody traces: the trace goes on as it came."""

    headers: Mapping[str, str]

    def child(self, name: str, **attributes: Value) -> AbstractContextManager[Span]:
        """Itself."""
        del name, attributes
        return contextlib.nullcontext(self)

    def event(self, name: str) -> None:
        """Nothing."""

    def end(self, outcome: str = "ok") -> None:
        """Nothing."""


class NoSpans:
    """Makes no spans."""

    def begin(self, name: str, trace: Mapping[str, str], **attributes: Value) -> Span:
        """The trace as it came."""
        del name, attributes
        return NoSpan(trace)

    def close(self) -> None:
        """Nothing is left."""


def carried(request: GenerationRequest, span: Span) -> GenerationRequest:
    """The request under this span."""
    return request if span.headers is request.trace else replace(request, trace=span.headers)


@dataclass(frozen=True)
class TraceSettings:
    """Where spans are sent to."""

    enabled: bool = False
    protocol: str = "grpc"
    endpoint: str = ""
    service: str = ""
    """What the process is called; empty for its own name."""


def load_settings(environ: Mapping[str, str] | None = None) -> TraceSettings:
    """Reads the four variables: an endpoint alone is enough, unless OTEL_EXPORT_ENABLED says no. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    endpoint, protocol = environ.get(ENDPOINT_VARIABLE, ""), environ.get(PROTOCOL_VARIABLE) or "grpc"
    if protocol not in _PROTOCOLS:
        raise ConfigError(f"{PROTOCOL_VARIABLE}={protocol!r} is not valid: {' or '.join(_PROTOCOLS)}")
    try:
        enabled = parse_bool(environ[ENABLED_VARIABLE]) if environ.get(ENABLED_VARIABLE) else bool(endpoint)
    except ValueError as exc:
        raise ConfigError(f"{ENABLED_VARIABLE}={environ[ENABLED_VARIABLE]!r} is not valid: {exc}") from exc
    return TraceSettings(enabled, protocol, endpoint or _DEFAULT_ENDPOINTS[protocol], environ.get(SERVICE_VARIABLE, ""))


def open_spans(process: str, settings: TraceSettings | None = None) -> Spans:
    """What the settings say; `process` is the service's name where OTEL_SERVICE_NAME names none. Raises ConfigError."""
    settings = load_settings() if settings is None else settings
    if not settings.enabled:
        return NoSpans()
    from tandem_protocol.otlp import OtlpSpans  # opentelemetry takes a while to import, and few want it

    return OtlpSpans(settings, process)
