# SPDX-License-Identifier: Apache-2.0
"""`tandem status`: which models a server has, whether they serve, how busy their workers are, and whom its router places on.

Triton says which models are loaded; load and health come from the admin servers of workers and router, which are on loopback
unless told otherwise, so from another host those columns are empty.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from tandem_cli import status_fleet
from tandem_cli.client import CONTROL_TIMEOUT_S, GenerationClient, IndexEntry
from tandem_cli.serve.fleet import ROUTER
from tandem_cli.status_fleet import RouterFleet, fetch_fleet, fleet_json, fleet_rows
from tandem_protocol.errors import TandemError, UnavailableError

COLUMNS = ("model", "kind", "role", "ready", "running", "waiting", "KV use")
_NOTHING = "-"
_READY = "ready"


@dataclass(frozen=True)
class Health:
    """What a worker's admin server says of itself."""

    status: str
    model: str
    role: str
    active: int
    running: int
    waiting: int
    kv_usage: float


@dataclass(frozen=True)
class ModelStatus:
    """One row. `reason` says why something is missing or not ready."""

    model: str
    ready: bool
    kind: str | None = None
    role: str | None = None
    health: Health | None = None
    reason: str | None = None

    @property
    def serves(self) -> bool:
        """Loaded by Triton, and its worker doesn't say otherwise."""
        return self.ready and (self.health is None or self.health.status == _READY)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS."""
        health = self.health
        load = (str(health.running), str(health.waiting), f"{health.kv_usage:.0%}") if health else (_NOTHING,) * 3
        return (self.model, self.kind or _NOTHING, self.role or _NOTHING, self._state, *load)

    @property
    def _state(self) -> str:
        if self.ready:
            return self.health.status if self.health else _READY
        return f"no ({self.reason})" if self.reason else "no"


@dataclass(frozen=True)
class Routing:
    """What the server's router says of its workers, or why it says nothing."""

    fleet: RouterFleet | None = None
    reason: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--url", default="localhost:8001", help="Triton's gRPC address (default: %(default)s)")
    parser.add_argument("--admin-port", type=int, default=8081, help="admin port of worker 0; worker n adds n to it (default: 8081)")
    parser.add_argument("--router-admin-port", type=int, default=8079, help="admin port of the router's first instance (default: 8079)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Raises UnavailableError, after printing, when nothing serves."""
    rows, routing = asyncio.run(_collect_all(args.url, args.admin_port, args.router_admin_port))
    if args.json:
        print(json.dumps(_to_json(args.url, rows, routing)))
    else:
        _show(rows)
        _show_routing(routing)
    if not any(row.serves for row in rows):
        raise UnavailableError(f"no model is ready at {args.url}: wait if the engines are still starting, else look at the server's log")
    return 0


async def _collect_all(url: str, admin_port: int, router_port: int) -> tuple[list[ModelStatus], Routing | None]:
    rows = await collect(url, admin_port)
    served = any(row.model == ROUTER and row.ready for row in rows)
    return rows, await collect_routing(url.rpartition(":")[0], router_port) if served else None


async def collect_routing(host: str, port: int) -> Routing:
    """Asks a router's admin server for its fleet."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)) as http:
        try:
            return Routing(await fetch_fleet(http, f"http://{host}:{port}"))
        except ValueError as exc:
            return Routing(reason=str(exc))


async def collect(url: str, admin_port: int) -> list[ModelStatus]:
    """One row for each model that the server knows, all asked at once."""
    host = url.rpartition(":")[0]
    timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)
    async with GenerationClient(url) as client, aiohttp.ClientSession(timeout=timeout) as http:
        entries = await client.index()
        return list(await asyncio.gather(*(_model_status(client, http, entry, host, admin_port) for entry in entries)))


async def _model_status(client: GenerationClient, http: aiohttp.ClientSession, entry: IndexEntry, host: str, port: int) -> ModelStatus:
    if not entry.ready:
        return ModelStatus(entry.name, ready=False, reason=entry.reason)
    try:
        info = await client.info(entry.name)
    except TandemError as exc:
        return ModelStatus(entry.name, ready=True, reason=f"its config can't be read: {exc}")
    if info.steps:
        return ModelStatus(entry.name, ready=True, kind="ensemble")
    role = info.parameters.get("role")
    if role is None:
        return ModelStatus(entry.name, ready=True, kind="model")
    try:
        health = await _health(http, f"http://{host}:{port + int(info.parameters.get('worker_index', '0'))}/health", entry.name)
    except ValueError as exc:
        return ModelStatus(entry.name, ready=True, kind="worker", role=role, reason=str(exc))
    return ModelStatus(entry.name, ready=True, kind="worker", role=health.role, health=health)


async def _health(http: aiohttp.ClientSession, url: str, model: str) -> Health:
    """Asks one admin server; an unready worker answers 503 with the same body. Raises ValueError with the reason."""
    try:
        async with http.get(url) as response:
            health = parse_health(await response.read())
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise ValueError(f"{url} does not answer: {str(exc) or 'no answer in time'}") from exc
    if health.model != model:
        raise ValueError(f"{url} belongs to model {health.model}: give the --admin-port that this server was started with")
    return health


def parse_health(body: bytes) -> Health:
    """Reads the body of /health; fields that are not known here are left alone. Raises ValueError."""
    try:
        raw: dict[str, Any] = json.loads(body)
        active, running, waiting = (int(raw[name]) for name in ("active", "running", "waiting"))
        return Health(str(raw["status"]), str(raw["model"]), str(raw["role"]), active, running, waiting, float(raw["kv_usage"]))
    except (KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"/health is not a worker's answer ({exc!r}): another program may hold the admin port") from exc


def _to_json(url: str, rows: Sequence[ModelStatus], routing: Routing | None) -> dict[str, Any]:
    """`router` is null where the server has none that is ready."""
    models = [{**dataclasses.asdict(row), "serves": row.serves} for row in rows]
    router = routing and {"fleet": routing.fleet and fleet_json(routing.fleet), "reason": routing.reason}
    return {"url": url, "models": models, "router": router}


def _show(rows: Sequence[ModelStatus]) -> None:
    _show_table(COLUMNS, [row.cells for row in rows], [row.serves for row in rows])


def _show_routing(routing: Routing | None) -> None:
    if routing is None:
        return
    print()
    if routing.fleet is None:
        print(f"the router's fleet is not known: {routing.reason}")
        return
    print(routing.fleet.title)
    _show_table(status_fleet.COLUMNS, fleet_rows(routing.fleet), [worker.placed for worker in routing.fleet.workers])


def _show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], good: Sequence[bool]) -> None:
    """Rows that are not `good` are red at a terminal."""
    if not sys.stdout.isatty():
        print(plain_table(columns, rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row, fine in zip(rows, good, strict=True):
        table.add_row(*(Text(cell) for cell in row), style=None if fine else "red")
    Console().print(table)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with blanks."""
    lines = [columns, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
