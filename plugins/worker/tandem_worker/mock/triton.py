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
from tandem_protocol.triton import TritonSink
from tandem_worker.mock.host import MockHost
from tandem_worker.mock.options import MockOptions, parse


class TritonPythonModel:
    """One mock worker."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declares the tensors of the worker's role."""
        try:
            role = _options(auto_complete_model_config.as_dict()).engine.role
        except TandemError as exc:
            raise triton.load_failure(exc) from exc
        outputs = tensors.outputs_of(role)
        return triton.declare(auto_complete_model_config, tensors.inputs_of(role), outputs, decoupled=tensors.is_decoupled(role))

    def initialize(self, args: dict[str, str]) -> None:
        """Starts and registers the worker; a wrong setting ends the load with one sentence."""
        triton.configure_logging(args["model_name"], "tandem_worker")
        try:
            options = _options(json.loads(args["model_config"]))
            self._role = options.engine.role
            self._host = MockHost(options, args["model_name"], os.environ.get("TANDEM_GRPC_URL", "127.0.0.1:8001"))
            self._host.start()
        except TandemError as exc:
            raise triton.load_failure(exc) from exc

    def execute(self, requests: list[Any]) -> None:
        """Hands every request over."""
        triton.take_all(requests, self._submit, decoupled=tensors.is_decoupled(self._role))

    def finalize(self) -> None:
        """Leaves discovery and ends."""
        self._host.stop()

    def _submit(self, request: Any, sink: TritonSink) -> None:
        parameters = triton.request_parameters(request)
        if tensors.ABORT_PARAMETER in parameters:
            self._host.abort(str(parameters[tensors.ABORT_PARAMETER]))
            sink.send({}, final=True)
            return
        envelope = triton.envelope(request, parameters)
        self._host.submit(parse_request(lambda name: triton.read_tensor(request, name), envelope, self._role), sink)


def _options(config: dict[str, Any]) -> MockOptions:
    return parse(shlex.split(triton.parameters_of(config).get("arguments", "")))
