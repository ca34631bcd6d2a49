# SPDX-License-Identifier: Apache-2.0
"""`python -m tandem_worker.mock`: mock vLLM workers in one process."""

import asyncio
import sys

from tandem_protocol import logs
from tandem_protocol.errors import ConfigError
from tandem_worker.mock.options import parse
from tandem_worker.mock.server import run


def main() -> int:
    """Runs until SIGTERM; exits with 2 for a wrong setting."""
    try:
        logs.configure("mock", "tandem_worker")
        asyncio.run(run(parse()))
    except ConfigError as exc:
        sys.stderr.write(f"tandem mock: {exc}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
