# SPDX-License-Identifier: Apache-2.0
"""The Triton Python model of an omni worker: that of the other workers around a pipeline."""

from pathlib import Path

from tandem_protocol.errors import ConfigError
from tandem_protocol.requests import Envelope, TensorReader
from tandem_protocol.roles import Role
from tandem_worker import triton
from tandem_worker.config import WorkerSettings, load_settings
from tandem_worker.omni.requests import OmniRequest, parse_omni_request
from tandem_worker.omni.worker import OmniWorker


class TritonPythonModel(triton.TritonPythonModel):
    """One omni worker."""

    def settings_of(self, parameters: dict[str, str]) -> WorkerSettings:
        """Refuses other roles."""
        settings = load_settings(parameters)
        if settings.effective_role is not Role.OMNI:
            raise ConfigError(f"this model runs a pipeline, and its role is {settings.effective_role}: set `role` to omni in config.pbtxt, "
                              "and neither DYN_VLLM_IS_PREFILL_WORKER nor DYN_VLLM_IS_DECODE_WORKER")
        return settings

    def worker_of(self, settings: WorkerSettings, model_name: str, folder: Path) -> OmniWorker:
        """Not started yet."""
        return OmniWorker(settings, model_name, folder)

    def request_of(self, read: TensorReader, envelope: Envelope) -> OmniRequest:
        """With what only pipelines take."""
        return parse_omni_request(read, envelope)
