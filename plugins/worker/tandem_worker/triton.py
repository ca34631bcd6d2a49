# SPDX-License-Identifier: Apache-2.0
"""The Triton Python model of every worker.

Triton calls `initialize`, `execute` and `finalize` on the stub's main thread. `execute` only parses and hands over, so
that many requests are in flight on the one instance; responses come from the outbox's thread.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import triton_python_backend_utils as pb_utils

from tandem_protocol import tensors, triton
from tandem_protocol.errors import TandemError, UnavailableError
from tandem_protocol.requests import Envelope, GenerationRequest, TensorReader, parse_request
from tandem_protocol.triton import TritonSink
from tandem_worker.config import WorkerSettings, load_settings
from tandem_worker.host import EngineHost
from tandem_worker.metrics.exposition import Exposition
from tandem_worker.worker import Worker

_ABORT_TIMEOUT_S = 5.0


class Startable(Protocol):
    """A worker as its model needs it: `worker.Worker`, or that of a pipeline."""

    exposition: Exposition
    """Complete once it has started."""

    def start(self) -> EngineHost[Any] | None:
        """Blocks until it serves. Raises ConfigError with a sentence that says the fix."""

    def stop(self) -> None:
        """Undoes all of it, also half-built."""


class TritonPythonModel:
    """One worker. Subclasses say what is another worker's: its settings, how it is built, what its requests hold."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declares the role's tensors, so that config.pbtxt need not, and no model may differ from the contract."""
        try:
            role = load_settings(triton.parameters_of(auto_complete_model_config.as_dict())).effective_role
        except TandemError as exc:
            raise triton.load_failure(exc) from exc
        outputs = tensors.outputs_of(role)
        return triton.declare(auto_complete_model_config, tensors.inputs_of(role), outputs, decoupled=tensors.is_decoupled(role))

    def initialize(self, args: dict[str, str]) -> None:
        """Starts the engine; a wrong setting ends the load with one sentence."""
        triton.configure_logging(args["model_name"], "tandem_worker")
        config = json.loads(args["model_config"])
        try:
            self._settings = self.settings_of(triton.parameters_of(config))
            self._worker = self.worker_of(self._settings, args["model_name"], Path(pb_utils.get_model_dir()))
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
        self._host.submit(self.request_of(lambda name: triton.read_tensor(request, name), envelope), sink)

    def settings_of(self, parameters: dict[str, str]) -> WorkerSettings:
        """From the parameters of config.pbtxt and the environment. Raises ConfigError."""
        return load_settings(parameters)

    def worker_of(self, settings: WorkerSettings, model_name: str, folder: Path) -> Startable:
        """Not started yet; `folder` is the model version's. Raises ConfigError."""
        return Worker(settings, model_name, folder)

    def request_of(self, read: TensorReader, envelope: Envelope) -> GenerationRequest:
        """Raises RequestError."""
        return parse_request(read, envelope, self._role)
