# SPDX-License-Identifier: Apache-2.0
"""What every Triton Python model of ours does at its edge. The only module of the protocol that knows `triton_python_backend_utils`.

Triton calls a model on the stub's main thread; responses are sent from the outbox's thread.
"""

import contextvars
import io
import json
import logging
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils
from prometheus_client.core import Metric

from tandem_protocol import logs
from tandem_protocol.errors import ErrorCode, RequestError, TandemError
from tandem_protocol.metric_mirror import Mirror, MirrorThread
from tandem_protocol.requests import Envelope
from tandem_protocol.streams import Arrays
from tandem_protocol.tensors import TensorSpec
from tandem_protocol.trace import split_trace

log = logging.getLogger(__name__)

_CODES = {
    ErrorCode.INVALID_ARGUMENT: "INVALID_ARG",
    ErrorCode.UNAVAILABLE: "UNAVAILABLE",
    ErrorCode.CANCELLED: "CANCELLED",
    ErrorCode.INTERNAL: "INTERNAL",
}


def declare(config: Any, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], *, decoupled: bool) -> Any:
    """Completes a model's configuration, so that config.pbtxt need not name tensors and no model may differ from the contract."""
    given = config.as_dict()
    known = {entry["name"] for entry in (*given["input"], *given["output"])}
    for spec in inputs:
        if spec.name not in known:
            config.add_input({"name": spec.name, "data_type": spec.data_type, "dims": list(spec.dims), "optional": spec.optional})
    for spec in outputs:
        if spec.name not in known:
            config.add_output({"name": spec.name, "data_type": spec.data_type, "dims": list(spec.dims)})
    config.set_max_batch_size(0)
    config.set_model_transaction_policy({"decoupled": decoupled})
    return config


def parameters_of(config: dict[str, Any]) -> dict[str, str]:
    """The parameters of config.pbtxt by name."""
    return {name: str(value["string_value"]) for name, value in config.get("parameters", {}).items()}


def request_parameters(request: Any) -> dict[str, Any]:
    """A request's own parameters, without those that Triton adds."""
    return {name: value for name, value in json.loads(request.parameters() or "{}").items() if not name.startswith("triton_")}


def read_tensor(request: Any, name: str) -> Any:
    """An input as an array, or None when the request doesn't carry it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def envelope(request: Any, parameters: Mapping[str, Any]) -> Envelope:
    """What Triton says of a request besides its tensors, with an id of ours where the client gave none; logs are about it from now on."""
    # Triton hands its request priority to Python models only in versions that have this method.
    priority = int(request.priority()) if hasattr(request, "priority") else 0
    request_id = request.request_id() or uuid.uuid4().hex
    trace, own = split_trace(parameters)
    logs.bind(request_id, trace)
    return Envelope(request_id, own, priority, request.timeout(), trace)


def take_all(requests: Iterable[Any], take: Callable[[Any, "TritonSink"], None], *, decoupled: bool = True) -> None:
    """Hands every request of a batch over with its sink; what `take` raises is that request's answer and disturbs no other.

    `decoupled`: as the model is declared.
    """
    for request in requests:
        contextvars.copy_context().run(_take, request, take, decoupled)  # what is bound for one request's logs is not about the next


def _take(request: Any, take: Callable[[Any, "TritonSink"], None], decoupled: bool) -> None:
    sink = TritonSink(request.get_response_sender(), decoupled=decoupled)
    try:
        take(request, sink)
    except TandemError as exc:
        sink.fail(exc)
    except Exception as exc:  # one request's oddity must not fail the others of this batch
        log.exception("request.rejected")
        sink.fail(RequestError(f"the request could not be read: {exc}"))


def load_failure(error: TandemError) -> Exception:
    """What `initialize` raises so that the load ends with this one sentence."""
    return pb_utils.TritonModelException(str(error))  # type: ignore[no-any-return]


def configure_logging(model_name: str, *packages: str) -> None:
    """Sends our packages' logs to stderr, which is tritonserver's log. A wrong level ends the load."""
    _speak_utf8()
    try:
        logs.configure(model_name, *packages)
    except TandemError as exc:
        raise load_failure(exc) from exc


def _speak_utf8() -> None:
    """The stub's embedded Python says its lines in ASCII, so that a library's dash would be a traceback in the log instead of its line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


class TritonMetrics:
    """Metrics of ours among Triton's own, on its port of metrics. Families are shared by all models of a server, and equal labels would be
    one series: `triton_instance` tells models and their instances apart.

    Resource handling: Triton wants metrics to go before their families, and both before the model; so forget the metrics, then `close`.
    """

    def __init__(self, instance: str) -> None:
        self._own = {"triton_instance": instance}
        self._families: dict[str, Any] = {}

    def show(self, name: str, text: str, kind: str, labels: Mapping[str, str], edges: Sequence[float] | None) -> Any:
        """A new series of `kind` counter, gauge or histogram. Raises TritonModelException, e.g. where the server has metrics off."""
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = pb_utils.MetricFamily(name, text or name, getattr(pb_utils.MetricFamily, kind.upper()))
        named = {**self._own, **labels}
        return family.Metric(labels=named) if edges is None else family.Metric(labels=named, buckets=list(edges))

    def close(self) -> None:
        """Forgets the families."""
        self._families.clear()


class MirroredMetrics:
    """Keeps metrics of ours on Triton's port of metrics up to date, every `interval_s` seconds from now on until `stop`; 0: never."""

    def __init__(self, families: Callable[[], Iterable[Metric]], interval_s: float, instance: str) -> None:
        self._metrics = TritonMetrics(instance)
        self._thread = MirrorThread(Mirror(families, self._metrics.show), interval_s)
        if interval_s > 0:
            self._thread.start()

    def stop(self) -> None:
        """Before the model is unloaded."""
        self._thread.stop()
        self._metrics.close()


class TritonSink:
    """Sends responses of one request. The outbox's thread sends, the cancellation poll asks.

    Triton frees the request's response factory when it handles the final response, and asking for cancellation after that
    crashes tritonserver (seen on 2.51). So the last send and the question exclude each other.

    The end of a good stream is sent by itself, so that a client that cancels when it has its last tokens doesn't do so between the final
    response and the end of its stream: 2.51's frontend then waits for a response that already came, keeps the request, and the model can
    never be unloaded. An error carries the end: where a client asked for true statuses (`triton_grpc_error`) the error ends its stream,
    and an end that comes later meets a stream that 2.51 has freed. The one response of a model that is not decoupled carries the end, too:
    its call has no place for another message.
    """

    def __init__(self, sender: Any, *, decoupled: bool = True) -> None:
        self._sender = sender
        self._decoupled = decoupled
        self._lock = threading.Lock()
        self._closed = False
        self._answered = False

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """Sends one response; the final one closes the stream.

        An end without arrays is no response of its own after others: HTTP's `generate` takes exactly one.
        """
        if not self._decoupled:
            self._close(_response(arrays))
            return
        if arrays or not (final and self._answered):
            self._sender.send(_response(arrays))
            self._answered = True
        if final:
            with self._lock:
                self._end(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, error: TandemError) -> None:
        """Closes the stream with an error."""
        code = getattr(pb_utils.TritonError, _CODES[error.code])
        self._close(pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error), code)))

    def is_cancelled(self) -> bool:
        """Whether the client went away; a round trip to Triton of about 0.1 ms."""
        with self._lock:
            return not self._closed and bool(self._sender.is_cancelled())

    def _close(self, response: Any) -> None:
        with self._lock:
            self._end(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _end(self, *response: Any, flags: int) -> None:
        """Lets the sender go: freed at the stub's end, after Triton's memory, it would crash the stub, and a traceback may keep a sink."""
        self._closed = True
        self._sender.send(*response, flags=flags)
        self._sender = None


def _response(arrays: Arrays) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])
