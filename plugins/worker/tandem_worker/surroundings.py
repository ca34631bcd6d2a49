# SPDX-License-Identifier: Apache-2.0
"""What is around the engine processes of one start: their environment, a scratch folder, and the guard over both.

Engine processes inherit this process's environment, so it is set here, before vLLM is imported.
"""

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem_protocol import logs
from tandem_protocol.guard import say_goodbye
from tandem_worker.config import WorkerSettings
from tandem_worker.environment import engine_environment, metrics_folder, overridable
from tandem_worker.guard import Ward, start_guard
from tandem_worker.ranks import local_ranks

_GOODBYE_TIMEOUT_S = 5.0


class Surroundings:
    """Of one start. Resource handling: `leave` after the engine's end; whoever is killed before leaves that to the guard."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.token = uuid.uuid4().hex
        """Unique; by it a start's processes are found."""
        self.scratch = Path(tempfile.mkdtemp(prefix="tandem-"))
        self._settings = settings
        self._guard: subprocess.Popen[bytes] | None = None
        metrics_folder(self.scratch).mkdir()

    def enter(self, arguments: Mapping[str, Any], server_pid: int) -> None:
        """Sets the environment for an engine with these arguments, and starts the guard. Raises ConfigError for wrong ranks.

        `server_pid`: the process with which all of it ends.
        """
        for name, value in overridable(self._settings).items():
            os.environ.setdefault(name, value)
        # vLLM's lines have our format and its own filter, unless its own variables say otherwise.
        for name, value in logs.engine_variables(logs.load_settings(), self.scratch / "logging.json").items():
            os.environ.setdefault(name, value)
        os.environ.update(engine_environment(self._settings, token=self.token, stub_pid=os.getpid(), scratch=self.scratch,
                                             ranks=local_ranks(arguments)))
        self._guard = start_guard(Ward(server_pid, os.getpid(), self.token, self.scratch, self._settings.server_exit_timeout_s))

    def leave(self) -> None:
        """Ends the guard, removes the folder; repeating it does nothing."""
        if self._guard is not None:
            say_goodbye(self._guard, _GOODBYE_TIMEOUT_S)
        shutil.rmtree(self.scratch, ignore_errors=True)
