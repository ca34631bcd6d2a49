# SPDX-License-Identifier: Apache-2.0
"""A router in a process of its own, for tests that kill one. `python tests/router_process.py STORE WORKERS TOKENIZER [NAME=VALUE ...]`.

Its first line says where it is; every line that it reads is a request to send: {"prompt": [...], "max_tokens": n}, or {} to abort all.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routers import router, url_of
from servers import get_json


@dataclass
class OtherRouter:
    """A router in another process."""

    process: "subprocess.Popen[str]"
    name: str
    admin: str

    def send(self, prompt: list[int], max_tokens: int) -> None:
        """Has it serve a request; nobody reads the answer."""
        self._tell({"prompt": prompt, "max_tokens": max_tokens})

    def abort(self) -> None:
        """Has it abort every request that it was given here."""
        self._tell({})

    def _tell(self, call: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()

    @property
    def fleet(self) -> dict[str, Any]:
        """What it says of its fleet."""
        return dict(get_json(f"{self.admin}/fleet"))

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)


@contextmanager
def other_router(store: Path | str, workers: int, tokenizer: Path, **settings: str) -> Iterator[OtherRouter]:
    """A router process that has found so many workers; killed at the end."""
    arguments = [url_of(store), str(workers), str(tokenizer), *(f"{name}={value}" for name, value in settings.items())]
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield OtherRouter(process, **json.loads(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate(timeout=10)


def main(store: str, workers: str, tokenizer: str, *settings: str) -> None:
    """Serves until its input ends."""
    with router(store, int(workers), Path(tokenizer), **dict(item.split("=", 1) for item in settings)) as local:
        print(json.dumps({"name": local.router.name, "admin": local.admin}), flush=True)  # noqa: T201 - whoever started us reads it
        for number, line in enumerate(sys.stdin):
            if call := json.loads(line):
                local.send(call["prompt"], f"request-{number}", max_tokens=call["max_tokens"])
            else:
                for earlier in range(number):
                    local.router.abort(f"request-{earlier}")


if __name__ == "__main__":
    main(*sys.argv[1:])
