# SPDX-License-Identifier: Apache-2.0
"""The Triton Python model of every worker.

Triton calls `initialize`, `execute` and `finalize` on the stub's main thread. `execute` only parses and hands over, so
that many requests are in flight on the one instance; responses come from the outbox's thread.
"""

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from tandem_protocol import tensors, triton
from tandem_protocol.errors import TandemError, UnavailableError
from tandem_protocol.requests import parse_request
from tandem_protocol.triton import TritonSink
from tandem_worker.config import WorkerSettings, load_settings
from tandem_worker.worker import Worker

_ABORT_TIMEOUT_S = 5.0


class TritonPythonModel:
    """One worker."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declares the role's tensors, so that config.pbtxt need not, and no model may differ from the contract."""
        try:
            role = _settings(auto_complete_model_config.as_dict()).effective_role
        except TandemError as exc:
            raise triton.load_failure(exc) from exc
        outputs = tensors.outputs_of(role)
        return triton.declare(auto_complete_model_config, tensors.inputs_of(role), outputs, decoupled=tensors.is_decoupled(role))

    def initialize(self, args: dict[str, str]) -> None:
        """Starts the engine; a wrong setting ends the load with one sentence."""
        triton.configure_logging(args["model_name"], "tandem_worker")
        config = json.loads(args["model_config"])
        try:
            self._settings = _settings(config)
            self._worker = Worker(self._settings, args["model_name"], Path(pb_utils.get_model_dir()))
        except TandemError as exc:
            raise triton.load_failure(exc) from exc
        try:
            self._host = self._worker.start()
        except BaseException as exc:
            self._worker.stop()
            if isinstance(exc, TandemError):
                raise triton.load_failure(exc) from exc
            raise
        self._role = self._settings.effective_role
        self._mirror = triton.MirroredMetrics(self._worker.exposition.families, self._settings.triton_metrics_interval_s,
                                              args["model_instance_name"])

    def execute(self, requests: list[Any]) -> None:
        """Hands every request over; answers come through the response senders."""
        triton.take_all(requests, self._submit, decoupled=tensors.is_decoupled(self._role))

    def finalize(self) -> None:
        """Drains, shuts down, leaves nothing behind."""
        self._mirror.stop()
        self._worker.stop()

    def _submit(self, request: Any, sink: TritonSink) -> None:
        if self._host is None:
            raise UnavailableError("this worker was only to be checkpointed, and its server ends: ask another")
        parameters = triton.request_parameters(request)
        if tensors.ABORT_PARAMETER in parameters:
            self._host.run(self._host.abort(str(parameters[tensors.ABORT_PARAMETER]))).result(_ABORT_TIMEOUT_S)
            sink.send({}, final=True)
            return
        envelope = triton.envelope(request, parameters)
        self._host.submit(parse_request(lambda name: triton.read_tensor(request, name), envelope, self._role), sink)


def _settings(config: dict[str, Any]) -> WorkerSettings:
    return load_settings(triton.parameters_of(config))
