# SPDX-License-Identifier: Apache-2.0
"""`python -m tandem_planner`: looks, decides and scales until SIGTERM. The fleet stays as it is when the planner ends."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

# Before numpy is imported, which reads it then. The planner's matrices are tiny: threads of OpenBLAS only wait for each other, ten times
# as long as the work takes when the host has few free cores.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

from tandem_planner.admin import AdminServer
from tandem_planner.arguments import Chosen, parse
from tandem_planner.brain import PlannerBrain
from tandem_planner.connectors import Connector, Means, open_connector
from tandem_planner.connectors.dry_run import DryRunConnector
from tandem_planner.loop import Parts, PlannerLoop
from tandem_planner.metrics import PlannerMetrics
from tandem_planner.observe import Observer
from tandem_planner.prometheus import Prometheus
from tandem_planner.queries import TrafficQueries
from tandem_planner.rhythm import Rhythm
from tandem_planner.state_file import SavedState, read_state
from tandem_protocol import logs
from tandem_protocol.discovery import Discovery, open_discovery
from tandem_protocol.errors import ConfigError

log = logging.getLogger(__name__)


def main() -> int:
    """Runs until it is told to stop; exits with 2 for a wrong setting."""
    try:
        logs.configure("planner", "tandem_planner")
        asyncio.run(run(parse()))
    except ConfigError as exc:
        sys.stderr.write(f"tandem planner: {exc}\n")
        return 2
    return 0


async def run(chosen: Chosen) -> None:
    """Until a signal comes. Raises ConfigError for settings that can't be."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        loop, metrics = _assemble(chosen, stack)
        admin = AdminServer(loop, metrics)
        stack.push_async_callback(admin.stop)
        service = chosen.service
        port = await admin.start(service.admin_host, service.admin_port)
        log.info("planner.started mode=%s connector=%s admin=http://%s:%d", chosen.config.mode, service.connector, service.admin_host, port)
        await loop.run(stop)


def _assemble(chosen: Chosen, stack: contextlib.AsyncExitStack) -> tuple[PlannerLoop, PlannerMetrics]:
    """The stack closes all of it, the loop first."""
    config, service = chosen.config, chosen.service
    saved = _saved(service.state)
    brain = PlannerBrain.of(config, saved.brain if saved is not None else None)
    discovery = open_discovery(service.discovery) if service.discovery else None
    connector = _connector(chosen, discovery, stack)
    prometheus = Prometheus(service.prometheus_endpoint, service.query_timeout_s)
    stack.push_async_callback(prometheus.close)
    traffic = TrafficQueries(service.metrics_source, service.metrics_model, service.metrics_namespace)
    observer = Observer(prometheus, traffic, discovery.list if discovery is not None else None, service.metrics_max_age_s, time.time)
    metrics = PlannerMetrics()
    gpus = {role: config.gpus(role) for role in config.roles}
    parts = Parts(brain, observer, connector, metrics, gpus, Path(service.state) if service.state else None)
    loop = PlannerLoop(parts, Rhythm(service.start_delay_s, config.load_interval, config.adjustment_interval), saved)
    stack.push_async_callback(loop.close)
    return loop, metrics


def _connector(chosen: Chosen, discovery: Discovery | None, stack: contextlib.AsyncExitStack) -> Connector:
    """Closed by the loop; discovery by the stack."""
    if discovery is not None:
        stack.push_async_callback(discovery.close)
    opened = open_connector(Means(chosen.service, chosen.config.roles, discovery.list if discovery is not None else None))
    return DryRunConnector(opened) if chosen.config.no_operation else opened


def _saved(path: str) -> SavedState | None:
    """A state that can't be read is said and left out: it must not keep the planner from its work."""
    try:
        return read_state(Path(path)) if path else None
    except ConfigError as exc:
        log.warning("planner.no_state: %s", exc)
        return None


if __name__ == "__main__":
    sys.exit(main())
