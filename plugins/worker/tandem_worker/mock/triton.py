# SPDX-License-Identifier: Apache-2.0
"""A Triton Python model that is a mock worker. Its config.pbtxt parameter `arguments` is the mock's command line.

Only for tests and demonstrations: it schedules like an engine and computes nothing.
"""

import json
import os
import shlex
from typing import Any

from tandem_protocol import tensors, triton
from tandem_protocol.errors import TandemError
from tandem_protocol.requests import parse_request
from tandem_protocol.roles import Role
from tandem_protocol.triton import TritonSink
from tandem_worker.mock.host import MockHost
from tandem_worker.mock.options import parse


class TritonPythonModel:
    """One mock worker."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declares an aggregated worker's tensors."""
        role = Role.AGGREGATED
        return triton.declare(auto_complete_model_config, tensors.inputs_of(role), tensors.outputs_of(role), decoupled=True)

    def initialize(self, args: dict[str, str]) -> None:
        """Starts and registers the worker; a wrong setting ends the load with one sentence."""
        triton.configure_logging(args["model_name"], "tandem_worker")
        parameters = triton.parameters_of(json.loads(args["model_config"]))
        try:
            options = parse(shlex.split(parameters.get("arguments", "")))
            self._host = MockHost(options, args["model_name"], os.environ.get("TANDEM_GRPC_URL", "127.0.0.1:8001"))
            self._host.start()
        except TandemError as exc:
            raise triton.load_failure(exc) from exc

    def execute(self, requests: list[Any]) -> None:
        """Hands every request over."""
        triton.take_all(requests, self._submit)

    def finalize(self) -> None:
        """Leaves discovery and ends."""
        self._host.stop()

    def _submit(self, request: Any, sink: TritonSink) -> None:
        envelope = triton.envelope(request, triton.request_parameters(request))
        self._host.submit(parse_request(lambda name: triton.read_tensor(request, name), envelope, Role.AGGREGATED), sink)
