# SPDX-License-Identifier: Apache-2.0
"""The Triton Python model `router`: the tensors of a worker, served by whichever worker is cheapest.

`execute` only parses and hands over, so that many requests are in flight on one instance. Each instance of the model is a process
with an index and books of its own, and with a guard that ends the server when the process dies without a word.
"""

import json
import os
from typing import Any

from tandem_protocol import tensors, triton
from tandem_protocol.errors import TandemError
from tandem_protocol.guard import say_goodbye, start_guard
from tandem_protocol.requests import parse_request
from tandem_protocol.roles import Role
from tandem_protocol.triton import TritonSink
from tandem_router.config import load_settings
from tandem_router.index import warm_up
from tandem_router.overrides import split
from tandem_router.router import Router

_GOODBYE_TIMEOUT_S = 5.0


class TritonPythonModel:
    """One router."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declares the tensors of an aggregated worker: any client of a worker is a client of the router."""
        role = Role.AGGREGATED
        return triton.declare(auto_complete_model_config, tensors.inputs_of(role), tensors.outputs_of(role), decoupled=True)

    def initialize(self, args: dict[str, str]) -> None:
        """Starts the router; a wrong setting ends the load with one sentence."""
        triton.configure_logging(args["model_instance_name"], "tandem_router")
        try:
            settings = load_settings(triton.parameters_of(json.loads(args["model_config"])))
            warm_up()  # compiled now, not within the first request
            self._router = Router(settings, _instance_index(args["model_instance_name"]))
            self._guard = start_guard(os.getppid(), os.getpid(), settings.server_exit_timeout_s)
            self._start()
            interval_s = settings.triton_metrics_interval_s
            self._mirror = triton.MirroredMetrics(self._router.metric_families, interval_s, args["model_instance_name"])
        except TandemError as exc:
            raise triton.load_failure(exc) from exc

    def execute(self, requests: list[Any]) -> None:
        """Hands every request over; answers come through the response senders."""
        triton.take_all(requests, self._submit)

    def finalize(self) -> None:
        """Ends what is in flight, closes everything."""
        self._mirror.stop()
        self._router.stop()
        say_goodbye(self._guard, _GOODBYE_TIMEOUT_S)

    def _start(self) -> None:
        try:
            self._router.start()
        except BaseException:  # Triton fails the load and goes on: the guard must not take the end of this process for a death
            say_goodbye(self._guard, _GOODBYE_TIMEOUT_S)
            raise

    def _submit(self, request: Any, sink: TritonSink) -> None:
        parameters = triton.request_parameters(request)
        if tensors.ABORT_PARAMETER in parameters:
            self._router.abort(str(parameters[tensors.ABORT_PARAMETER]))
            sink.send({}, final=True)
            return
        overrides, rest = split(parameters)
        envelope = triton.envelope(request, rest)
        parsed = parse_request(lambda name: triton.read_tensor(request, name), envelope, Role.AGGREGATED)
        self._router.submit(parsed, overrides, sink)


def _instance_index(instance_name: str) -> int:
    """Triton numbers the instances of a group: `router_0_1` is the second."""
    last = instance_name.rsplit("_", 1)[-1]
    return int(last) if last.isdigit() else 0
