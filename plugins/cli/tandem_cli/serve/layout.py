# SPDX-License-Identifier: Apache-2.0
"""Where things are on disk: the shipped model repository, the caches, the folder of one run."""

import os
from dataclasses import dataclass
from pathlib import Path

ROOT_VARIABLE = "TANDEM_ROOT"
HOME_VARIABLE = "TANDEM_HOME"
RUN_VARIABLE = "TANDEM_RUN_DIR"


def source_root() -> Path:
    """The folder with `model_repository/` and `backends/`: the checkout, or TANDEM_ROOT in a container."""
    given = os.environ.get(ROOT_VARIABLE)
    return Path(given) if given else Path(__file__).resolve().parents[4]


def tandem_home() -> Path:
    """Caches that outlive a checkout: environments, converted models, logs."""
    given = os.environ.get(HOME_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one running server, named after its HTTP port."""

    path: Path

    @property
    def state(self) -> Path:
        """What is needed to find and stop the server."""
        return self.path / "state.json"

    @property
    def models(self) -> Path:
        """The model repository of this run."""
        return self.path / "models"

    @property
    def backends(self) -> Path:
        """Triton's backends plus the drop-in `vllm`."""
        return self.path / "backends"

    @property
    def discovery(self) -> Path:
        """Where this run's workers register, unless the caller chose another discovery."""
        return self.path / "discovery"

    @property
    def embeddings(self) -> Path:
        """What this run's encode workers leave for the others."""
        return self.path / "embeddings"

    @property
    def log(self) -> Path:
        """The server's log; kept after the run, beside the folder."""
        return self.path.with_suffix(".log")


def runs_folder() -> Path:
    """The folder of all runs of this user."""
    given = os.environ.get(RUN_VARIABLE)
    return Path(given) if given else tandem_home() / "run"


def run_folder(http_port: int) -> RunFolder:
    """The folder of the run on this port, which may not exist."""
    return RunFolder(runs_folder() / str(http_port))
