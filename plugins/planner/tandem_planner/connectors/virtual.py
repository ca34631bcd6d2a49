# SPDX-License-Identifier: Apache-2.0
"""Leaves decisions in etcd for somebody else who starts and ends workers: Dynamo's keys, so that its `VirtualConnectorClient` reads them.

Under `v1/<namespace>/planner/`: `num_prefill_workers`, `num_decode_workers`, `decision_id`, and the client's acknowledgement
`scaled_decision_id`; ours, besides, `num_aggregated_workers`. Numbers as decimal text; one transaction per decision, so that nobody reads
half of one. Edge module: knows etcd3gw.
"""

import asyncio
import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception

from tandem_planner.connectors.interface import Bounds, Connector, wait_until
from tandem_planner.terms import Pool
from tandem_protocol.discovery.etcd import connect, parse_address, read_all
from tandem_protocol.errors import UnavailableError
from tandem_protocol.roles import Role

T = TypeVar("T")
_DECISION, _SCALED = "decision_id", "scaled_decision_id"
_KEYS = {Role.PREFILL: "num_prefill_workers", Role.DECODE: "num_decode_workers", Role.AGGREGATED: "num_aggregated_workers",
         Role.ENCODE: "num_encode_workers"}
_TRIES = 5


@dataclass(frozen=True)
class Board:
    """What stands there."""

    workers: Mapping[Role, int]
    decision: int = -1
    """-1: none yet, as Dynamo has it."""
    scaled: int = -1

    @property
    def done(self) -> bool:
        """Whether the latest decision was carried out."""
        return self.scaled >= self.decision


class VirtualConnector(Connector):
    """One fleet. Calls to etcd are made on threads, one at a time."""

    def __init__(self, store: str, namespace: str, bounds: Bounds, roles: tuple[Role, ...]) -> None:
        """`store`: etcd://host:port; `roles`: the pools to scale. Raises ConfigError for another URL."""
        address = parse_address(store.removeprefix("etcd:"))
        self._client: Etcd3Client = connect(address)
        self._prefix = f"v1/{namespace}/planner/"
        self._bounds = bounds
        self._roles = roles
        self._acknowledged: dict[Role, int] = {}
        self._turn = asyncio.Lock()

    async def pools(self) -> Mapping[Role, Pool]:
        """As decided and as acknowledged: who scales says nothing else. Before any decision a pool counts as empty and settled."""
        board = await self._read()
        wanted = {role: board.workers.get(role, 0) for role in self._roles}
        if board.done:
            self._acknowledged = dict(wanted)
        return {role: Pool(ready=self._ready(role, count, done=board.done), wanted=count) for role, count in wanted.items()}

    def _ready(self, role: Role, wanted: int, *, done: bool) -> int:
        """Of a decision under way only what was there before is certain; after a restart not even that, and the pool is not settled."""
        return wanted if done else self._acknowledged.get(role, max(0, wanted - 1))

    async def scale(self, role: Role, count: int) -> None:
        """Writes the decision, unless it stands there, and waits for its acknowledgement."""
        decision = await self._call(lambda: self._decide(role, count))

        async def acknowledged() -> bool:
            return (await self._read()).scaled >= decision

        await wait_until(acknowledged, self._bounds, f"an acknowledgement of decision {decision} ({count} {role} workers) in "
                                                     f"{self._prefix}{_SCALED}")

    def _decide(self, role: Role, count: int) -> int:
        """On a thread: the decision's id. Raises UnavailableError when others keep writing at the same time."""
        for _ in range(_TRIES):
            board = self._read_now()
            if board.workers.get(role) == count:
                return board.decision
            if self._write(board, role, count):
                return board.decision + 1
        raise UnavailableError(f"somebody else keeps changing {self._prefix}: let one planner scale a namespace")

    def _write(self, board: Board, role: Role, count: int) -> bool:
        """Whether the next decision was written: only if none came since `board` was read."""
        key = _b64(self._prefix + _DECISION)
        unchanged: dict[str, Any] = {"key": key, "target": "VALUE", "result": "EQUAL", "value": _b64(str(board.decision))}
        if board.decision < 0:
            unchanged = {"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": 0}
        puts = {**{_KEYS[one]: board.workers.get(one, 0) for one in self._roles}, _KEYS[role]: count, _DECISION: board.decision + 1}
        success = [{"requestPut": {"key": _b64(self._prefix + name), "value": _b64(str(value))}} for name, value in puts.items()]
        return bool(self._client.transaction({"compare": [unchanged], "success": success, "failure": []}).get("succeeded", False))

    def _read_now(self) -> Board:
        values = {name.removeprefix(self._prefix): int(raw) for name, raw in read_all(self._client, self._prefix).values.items()}
        workers = {role: values[key] for role, key in _KEYS.items() if key in values}
        return Board(workers, values.get(_DECISION, -1), values.get(_SCALED, -1))

    async def _read(self) -> Board:
        return await self._call(self._read_now)

    async def _call(self, call: Callable[[], T]) -> T:
        """On a thread, since etcd3gw blocks; each request has a deadline of its own (`tandem_protocol.discovery.etcd.Session`)."""
        async with self._turn:
            try:
                return await asyncio.to_thread(call)
            except (Etcd3Exception, requests.RequestException, ValueError, KeyError) as exc:
                raise UnavailableError(f"etcd can't be asked for {self._prefix}: {exc or type(exc).__name__}") from exc

    async def close(self) -> None:
        """Ends its connections."""
        await asyncio.to_thread(self._client.session.close)


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
