# SPDX-License-Identifier: Apache-2.0
"""Entry point: `python -m tandem_worker.followers FOLDER`, with `model.json` (engine arguments) and `parameters.json` (those of a
config.pbtxt) in the folder. Exits with 0 when it or its leader was told to end, 1 for a lost engine or leader, 2 for a wrong setting."""

import json
import sys
from pathlib import Path

from tandem_protocol import logs
from tandem_protocol.errors import ConfigError, TandemError
from tandem_worker.config import load_settings
from tandem_worker.followers.follower import Follower


def main(folder: Path) -> int:
    """Runs a follower; its exit code."""
    try:
        logs.configure("follower", "tandem_worker")
        Follower(load_settings(json.loads((folder / "parameters.json").read_text())), folder).run()
    except TandemError as exc:
        sys.stderr.write(f"tandem follower: {exc}\n")
        return 2 if isinstance(exc, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
