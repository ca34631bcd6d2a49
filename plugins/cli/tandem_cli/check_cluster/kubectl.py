# SPDX-License-Identifier: Apache-2.0
"""The edge to `kubectl`: each call is a subprocess with a deadline. It only reads, but for the pod of the image check."""

import shutil
import subprocess
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from tandem_protocol.errors import UnavailableError

T = TypeVar("T")
_SERVER_SHARE = 0.7
"""Of a call's deadline: what the server may take, so that kubectl itself can still say that it was too slow."""


@dataclass(frozen=True)
class Kubectl:
    """How the cluster is asked. `timeout_s` bounds each call."""

    namespace: str
    context: str = ""
    timeout_s: float = 15.0

    def text(self, *arguments: str, given: str | None = None) -> str:
        """What kubectl prints. Raises UnavailableError with what it says instead, or that it said nothing in time."""
        done = self.call(*arguments, given=given)
        if done.returncode != 0:
            raise UnavailableError(_reason(done))
        return done.stdout

    def decode(self, kind: type[T], *arguments: str) -> T:
        """What kubectl prints as JSON. Raises UnavailableError, also for an answer of another shape."""
        try:
            return msgspec.json.decode(self.text(*arguments, "--output=json"), type=kind)
        except msgspec.MsgspecError as exc:
            raise UnavailableError(f"kubectl {' '.join(arguments)} answered something else than expected: {exc}") from exc

    def call(self, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs kubectl. Raises UnavailableError if there is none or it takes too long."""
        program = shutil.which("kubectl")
        if program is None:
            raise UnavailableError("there is no kubectl on the PATH")
        context = [f"--context={self.context}"] if self.context else []
        bound = f"--request-timeout={max(1, int(self.timeout_s * _SERVER_SHARE))}s"
        command = [program, *context, bound, f"--namespace={self.namespace}", *arguments]
        try:
            return subprocess.run(command, input=given, capture_output=True, text=True, timeout=self.timeout_s, check=False)
        except subprocess.TimeoutExpired as exc:
            raise UnavailableError(f"kubectl {arguments[0]} did not answer within {self.timeout_s:g} s") from exc


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what it said: the ones before are usually repetitions."""
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"kubectl ended with code {done.returncode}"
