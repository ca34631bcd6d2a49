# SPDX-License-Identifier: Apache-2.0
"""The workers that a router places on, as `/fleet` of its admin port tells them: for `tandem status`.

They may run on any servers; what `tandem status` lists besides are the models of one.
"""

from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

COLUMNS = ("worker", "role", "state", "placed", "requests", "prefill tokens", "KV blocks", "index blocks", "address")


class FleetWorker(msgspec.Struct, frozen=True):
    """One worker; figures are what the router's books and index hold of it, over all its ranks."""

    id: str
    role: str
    state: str
    grpc_url: str
    triton_model: str
    placed: bool
    reason: str
    """Why placement leaves it out; empty if it doesn't."""
    active_requests: int
    active_prefill_tokens: float
    active_blocks: float
    total_blocks: int
    index_blocks: int

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS."""
        return (self.id, self.role, self.state, "yes" if self.placed else f"no ({self.reason})", str(self.active_requests),
                f"{self.active_prefill_tokens:.0f}", f"{self.active_blocks:.0f}/{self.total_blocks}", str(self.index_blocks),
                f"{self.grpc_url} {self.triton_model}")


class Replica(msgspec.Struct, frozen=True):
    """Another router of the same workers."""

    id: str
    synced: bool
    requests: int


class RouterFleet(msgspec.Struct, frozen=True):
    """What one instance of a router knows."""

    router: str
    ready: bool
    model: str
    active: int
    workers: tuple[FleetWorker, ...]
    replicas: tuple[Replica, ...] = ()

    @property
    def title(self) -> str:
        """One line about the router itself."""
        placed = sum(worker.placed for worker in self.workers)
        line = f"router {self.router} ({'ready' if self.ready else 'not ready'}) of {self.model or 'no model yet'}"
        others = f", other routers: {len(self.replicas)}" if self.replicas else ""
        return f"{line}: {self.active} requests in flight, {placed} of {len(self.workers)} workers placed{others}"


async def fetch_fleet(http: aiohttp.ClientSession, url: str) -> RouterFleet:
    """Asks a router's admin server. Raises ValueError with the reason."""
    try:
        async with http.get(f"{url}/fleet") as response:
            return parse_fleet(await response.read())
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise ValueError(f"{url} does not answer: {str(exc) or 'no answer in time'}") from exc


def parse_fleet(body: bytes) -> RouterFleet:
    """Reads the body of /fleet; fields that are not known here are left alone. Raises ValueError."""
    try:
        return msgspec.json.decode(body, type=RouterFleet)
    except msgspec.DecodeError as exc:
        raise ValueError(f"/fleet is not a router's answer ({exc}): another program may hold the router's admin port") from exc


def fleet_rows(fleet: RouterFleet) -> Sequence[tuple[str, ...]]:
    """One row for each worker, in the order of COLUMNS."""
    return [worker.cells for worker in fleet.workers]


def fleet_json(fleet: RouterFleet) -> Any:
    """For `--json`."""
    return msgspec.to_builtins(fleet)
