# SPDX-License-Identifier: Apache-2.0
"""The Triton Python model of every worker. Edge module: the only one that knows `triton_python_backend_utils`.

Triton calls `initialize`, `execute` and `finalize` on the stub's main thread. `execute` only parses and hands over, so
that many requests are in flight on the one instance; responses come from the outbox's thread.
"""

import json
import logging
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from tandem_protocol import tensors
from tandem_protocol.errors import ErrorCode, RequestError, TandemError
from tandem_worker.config import WorkerSettings, load_settings
from tandem_worker.requests import Envelope, parse_request
from tandem_worker.responses import Arrays
from tandem_worker.worker import Worker

log = logging.getLogger(__name__)

_CODES = {
    ErrorCode.INVALID_ARGUMENT: "INVALID_ARG",
    ErrorCode.UNAVAILABLE: "UNAVAILABLE",
    ErrorCode.CANCELLED: "CANCELLED",
    ErrorCode.INTERNAL: "INTERNAL",
}
_ABORT_TIMEOUT_S = 5.0


class TritonPythonModel:
    """One worker."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declares the role's tensors, so that config.pbtxt need not, and no model may differ from the contract."""
        config = auto_complete_model_config.as_dict()
        role = _settings(config).effective_role
        inputs = {entry["name"] for entry in config["input"]}
        outputs = {entry["name"] for entry in config["output"]}
        for spec in tensors.inputs_of(role):
            if spec.name not in inputs:
                auto_complete_model_config.add_input(
                    {"name": spec.name, "data_type": spec.data_type, "dims": list(spec.dims), "optional": True}
                )
        for spec in tensors.outputs_of(role):
            if spec.name not in outputs:
                auto_complete_model_config.add_output({"name": spec.name, "data_type": spec.data_type, "dims": list(spec.dims)})
        auto_complete_model_config.set_max_batch_size(0)
        auto_complete_model_config.set_model_transaction_policy({"decoupled": tensors.is_decoupled(role)})
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Starts the engine; a wrong setting ends the load with one sentence."""
        _configure_logging(args["model_name"])
        config = json.loads(args["model_config"])
        try:
            self._settings = _settings(config)
            self._worker = Worker(self._settings, args["model_name"], Path(pb_utils.get_model_dir()))
        except TandemError as exc:
            raise pb_utils.TritonModelException(str(exc)) from exc
        try:
            self._host = self._worker.start()
        except BaseException as exc:
            self._worker.stop()
            if isinstance(exc, TandemError):
                raise pb_utils.TritonModelException(str(exc)) from exc
            raise
        self._role = self._settings.effective_role

    def execute(self, requests: list[Any]) -> None:
        """Hands every request over; answers come through the response senders."""
        for request in requests:
            sink = _TritonSink(request.get_response_sender())
            try:
                self._submit(request, sink)
            except TandemError as exc:
                sink.fail(exc)
            except Exception as exc:  # one request's oddity must not fail the others of this batch
                log.exception("request.rejected")
                sink.fail(RequestError(f"the request could not be read: {exc}"))

    def finalize(self) -> None:
        """Drains, shuts down, leaves nothing behind."""
        self._worker.stop()

    def _submit(self, request: Any, sink: "_TritonSink") -> None:
        parameters = json.loads(request.parameters() or "{}")
        if tensors.ABORT_PARAMETER in parameters:
            self._host.run(self._host.abort(str(parameters[tensors.ABORT_PARAMETER]))).result(_ABORT_TIMEOUT_S)
            sink.send({}, final=True)
            return
        envelope = Envelope(
            request_id=request.request_id() or uuid.uuid4().hex,
            parameters={name: value for name, value in parameters.items() if not name.startswith("triton_")},
            priority=_priority(request),
            timeout_us=request.timeout(),
        )
        self._host.submit(parse_request(lambda name: _read(request, name), envelope, self._role), sink)


class _TritonSink:
    """Sends responses of one request. The outbox's thread sends, the cancellation poll asks.

    Triton frees the request's response factory when it handles the final response, and asking for cancellation after that
    crashes tritonserver (seen on 2.51). So the last send and the question exclude each other.
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._lock = threading.Lock()
        self._closed = False

    def send(self, arrays: Arrays, *, final: bool) -> None:
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])
        if final:
            self._close(response)
        else:
            self._sender.send(response)

    def fail(self, error: TandemError) -> None:
        code = getattr(pb_utils.TritonError, _CODES[error.code])
        self._close(pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error), code)))

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self._closed and bool(self._sender.is_cancelled())

    def _close(self, response: Any) -> None:
        with self._lock:
            self._closed = True
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _settings(config: dict[str, Any]) -> WorkerSettings:
    parameters = {name: str(value["string_value"]) for name, value in config.get("parameters", {}).items()}
    return load_settings(parameters)


def _read(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _priority(request: Any) -> int:
    """Triton hands its request priority to Python models only in versions that have this method."""
    return int(request.priority()) if hasattr(request, "priority") else 0


def _configure_logging(model_name: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s [{model_name}] %(name)s %(message)s"))
    for name in ("tandem_worker", "tandem_protocol"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
