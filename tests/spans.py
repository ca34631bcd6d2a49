# SPDX-License-Identifier: Apache-2.0
"""An OTLP collector for tests: takes spans over HTTP and gRPC."""

import gzip
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc  # type: ignore[import-untyped]  # grpcio ships no types
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceServicer, add_TraceServiceServicer_to_server


class Collector(TraceServiceServicer):
    """Remembers every span that it is sent, inside `with`."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._grpc = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._grpc)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1/traces"
        self.grpc_url = f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"

    @property
    def trace_ids(self) -> list[str]:
        """The trace of each span, in hexadecimal digits."""
        return [span.trace_id.hex() for span in self.spans]

    def Export(self, request: Any, context: Any) -> Any:  # the name is the protocol's
        """One batch of spans over gRPC."""
        del context
        self._take(request)
        return ExportTraceServiceResponse()

    def _take(self, batch: Any) -> None:
        for part in batch.resource_spans:
            self.services.update(pair.value.string_value for pair in part.resource.attributes if pair.key == "service.name")
            self.spans.extend(span for scope in part.scope_spans for span in scope.spans)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            """POST /v1/traces."""

            def do_POST(self) -> None:
                """One batch of spans over HTTP."""
                body = self.rfile.read(int(self.headers["Content-Length"]))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Silent."""

        return Handler

    def __enter__(self) -> "Collector":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self._grpc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(None)
