# SPDX-License-Identifier: Apache-2.0
"""The Triton Python model of an omni worker, as `tandem_worker.triton` is of the others.

Triton calls `initialize`, `execute` and `finalize` on the stub's main thread; responses come from the outbox's thread.
"""

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from tandem_protocol import tensors, triton
from tandem_protocol.errors import ConfigError, TandemError
from tandem_protocol.roles import Role
from tandem_protocol.triton import TritonSink
from tandem_worker.config import WorkerSettings, load_settings
from tandem_worker.omni.requests import parse_omni_request
from tandem_worker.omni.worker import OmniWorker

_ABORT_TIMEOUT_S = 5.0


class TritonPythonModel:
    """One omni worker."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declares the tensors, so that config.pbtxt need not, and no model may differ from the contract."""
        return triton.declare(auto_complete_model_config, tensors.inputs_of(Role.OMNI), tensors.outputs_of(Role.OMNI), decoupled=True)

    def initialize(self, args: dict[str, str]) -> None:
        """Starts the pipeline; a wrong setting ends the load with one sentence."""
        triton.configure_logging(args["model_name"], "tandem_worker")
        try:
            settings = _settings(json.loads(args["model_config"]))
            self._worker = OmniWorker(settings, args["model_name"], Path(pb_utils.get_model_dir()))
        except TandemError as exc:
            raise triton.load_failure(exc) from exc
        try:
            self._host = self._worker.start()
        except BaseException as exc:
            self._worker.stop()
            if isinstance(exc, TandemError):
                raise triton.load_failure(exc) from exc
            raise
        self._mirror = triton.MirroredMetrics(self._worker.exposition.families, settings.triton_metrics_interval_s,
                                              args["model_instance_name"])

    def execute(self, requests: list[Any]) -> None:
        """Hands every request over; answers come through the response senders."""
        triton.take_all(requests, self._submit)

    def finalize(self) -> None:
        """Drains, shuts down, leaves nothing behind."""
        self._mirror.stop()
        self._worker.stop()

    def _submit(self, request: Any, sink: TritonSink) -> None:
        parameters = triton.request_parameters(request)
        if tensors.ABORT_PARAMETER in parameters:
            self._host.run(self._host.abort(str(parameters[tensors.ABORT_PARAMETER]))).result(_ABORT_TIMEOUT_S)
            sink.send({}, final=True)
            return
        envelope = triton.envelope(request, parameters)
        self._host.submit(parse_omni_request(lambda name: triton.read_tensor(request, name), envelope), sink)


def _settings(config: dict[str, Any]) -> WorkerSettings:
    settings = load_settings(triton.parameters_of(config))
    if settings.effective_role is not Role.OMNI:
        raise ConfigError(f"this model runs a pipeline, and its role is {settings.effective_role}: set `role` to omni in config.pbtxt, and "
                          "neither DYN_VLLM_IS_PREFILL_WORKER nor DYN_VLLM_IS_DECODE_WORKER")
    return settings
