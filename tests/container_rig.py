# SPDX-License-Identifier: Apache-2.0
"""What tests of the container's scripts need: programs that only play a part, first in PATH, and the record of how they were called."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CONTAINER = Path(__file__).parents[1] / "container"
_TIMEOUT_S = 60
_RECORDER = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


@dataclass(frozen=True)
class Stage:
    """A folder of programs that go before the real ones."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir(parents=True, exist_ok=True)

    def program(self, name: str, text: str) -> None:
        """A shell script under this name."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def recorder(self, name: str) -> None:
        """A program that only notes how it was called."""
        path = self.folder / "bin" / name
        path.write_text(_RECORDER.format(python=sys.executable))
        path.chmod(0o755)

    def run(self, script: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Runs a script here, without Tandem's variables of this process."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TANDEM_", "DYN_", "VLLM_", "PIP_"))}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        variables = {**kept, "PATH": path, "RECORD": str(self.folder / "record"), **environment}
        return subprocess.run([script, *arguments], env=variables, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)

    def calls(self) -> list[list[str]]:
        """How recorders were called so far, program first."""
        path = self.folder / "record"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
