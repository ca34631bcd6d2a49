# SPDX-License-Identifier: Apache-2.0
"""A `kubectl` for tests: a program on the PATH that plays recorded answers and notes how it was called."""

import os
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import pytest

_HEAD = """#!/bin/sh
call=
for argument in "$@"; do
  case "$argument" in --request-timeout=* | --namespace=* | --context=*) ;; *) call="$call$argument " ;; esac
done
{ printf '%s\\n' "$@"; printf '\\035'; case "$call" in *--filename=-*) cat ;; esac; printf '\\036'; } >> CALLS
case "$call" in
"""
_TAIL = """*) echo "Error from server (NotFound): nothing was recorded for: $call" >&2; exit 1 ;;
esac
"""
_BETWEEN, _END = "\035", "\036"


@dataclass(frozen=True)
class Answer:
    """What kubectl says to calls that begin with `call`, without its global options."""

    call: str
    says: str = ""
    complains: str = ""
    code: int = 0
    hangs: bool = False

    def as_case(self) -> str:
        """A branch of the program."""
        does = "exec sleep 600" if self.hangs else f"printf %s {quote(self.says)}; printf %s {quote(self.complains)} >&2; exit {self.code}"
        return f"{quote(self.call)}*) {does} ;;\n"


@dataclass(frozen=True)
class FakeKubectl:
    """Lies in a folder that is first on the PATH."""

    folder: Path

    @property
    def _calls(self) -> Path:
        return self.folder / "calls"

    def play(self, *answers: Answer) -> None:
        """The first that fits is given."""
        program = self.folder / "kubectl"
        program.write_text(_HEAD.replace("CALLS", quote(str(self._calls))) + "".join(answer.as_case() for answer in answers) + _TAIL)
        program.chmod(0o755)

    def calls(self) -> list[tuple[list[str], str]]:
        """Arguments and standard input of each call so far."""
        text = self._calls.read_text() if self._calls.exists() else ""
        parts = [call.split(_BETWEEN) for call in text.split(_END) if call]
        return [(arguments.splitlines(), given) for arguments, given in parts]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    """Makes a folder with one that knows nothing yet, first on the PATH."""
    folder.mkdir(exist_ok=True)
    fake = FakeKubectl(folder)
    fake.play()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return fake
