# SPDX-License-Identifier: Apache-2.0
"""`python -m tandem_kvbm.consolidator`: one stream of KV events out of all of a worker's, until SIGTERM or the end of its parent."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys

import numpy as np

from tandem_kvbm.consolidator import wire
from tandem_kvbm.consolidator.admin import AdminServer
from tandem_kvbm.consolidator.config import ConsolidatorSettings, load_settings
from tandem_kvbm.consolidator.pump import Pump
from tandem_kvbm.consolidator.tracker import Tracker
from tandem_protocol.errors import ConfigError

_log = logging.getLogger(__name__)


def main() -> int:
    """Runs until it is told to stop; exits with 2 for a wrong setting."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(run(load_settings()))
    except ConfigError as exc:
        sys.stderr.write(f"tandem consolidator: {exc}\n")
        return 2
    return 0


async def run(settings: ConsolidatorSettings) -> None:
    """Serves until a signal comes or the watched process is gone. Raises ConfigError."""
    warm_up()
    pump = Pump(settings.plan())
    admin = AdminServer(pump.report)
    try:
        port = await admin.start(settings.admin_host, settings.effective_admin_port)
        pump.start()
        _log.info("consolidator.started port=%d publishers=%d admin=%d", settings.published_port, len(settings.all_publishers), port)
        await _until_told(settings.watched_pid)
    finally:
        await admin.stop()
        await asyncio.to_thread(pump.close)


def warm_up() -> None:
    """Compiles, or loads from the cache, all that the stream runs, so that no event waits for it."""
    tracker = Tracker({"warm": 0})
    hashes, tokens = wire.raw_hashes(np.arange(1, 3, dtype=np.uint64)), wire.raw_tokens(np.arange(8, dtype=np.uint32))
    stored = wire.Stored(hashes, None, tokens, 4)
    orphan = wire.Stored(wire.raw_hashes(np.array([9], np.uint64)), 8, wire.raw_tokens(np.arange(4, dtype=np.uint32)), 4, medium="CPU")
    parent = wire.Stored(wire.raw_hashes(np.array([8], np.uint64)), 2, wire.raw_tokens(np.arange(4, dtype=np.uint32)), 4)
    for event in (stored, orphan, parent, wire.Removed(hashes), wire.Cleared()):
        tracker.apply("warm", wire.encode(0.0, [event], 0), 0.0)
    tracker.expire(0.0)
    tracker.lanes[0].check_integrity()
    gc.collect()
    gc.freeze()  # the compiler's objects stay for good: without this, each full collection goes through all of them


async def _until_told(watched_pid: int) -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    if not watched_pid:
        await told.wait()
        return
    try:
        watched = os.pidfd_open(watched_pid)
    except ProcessLookupError:
        _log.info("consolidator.alone pid=%d is gone", watched_pid)
        return
    loop.add_reader(watched, told.set)
    try:
        await told.wait()
    finally:
        loop.remove_reader(watched)
        with contextlib.suppress(OSError):
            os.close(watched)


if __name__ == "__main__":
    sys.exit(main())
