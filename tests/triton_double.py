# SPDX-License-Identifier: Apache-2.0
"""A tritonserver's model repository and the admin ports of its workers, for tests of the connector: no process, no engine."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from discovery_contract import worker
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord, WorkerState


@dataclass
class Worker:
    """One worker model."""

    state: str = "UNAVAILABLE"
    record: WorkerState | None = None
    """None: not in discovery."""
    running: int = 0
    kv_use: float = 0.0
    stuck: bool = False
    """Its unload never ends."""
    broken: bool = False
    """It can't be loaded."""
    registers: bool = True
    """Whether it appears in discovery when it is loaded."""


@dataclass
class TritonDouble:
    """One server; what happened to it stands in `happened`."""

    workers: dict[str, Worker]
    role: Role = Role.AGGREGATED
    happened: list[str] = field(default_factory=list)
    refuses: str = ""
    """Every load is refused with this."""
    url: str = ""
    _runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listens; returns the URL, which is also every worker's admin URL, with its name."""
        app = web.Application()
        app.router.add_post("/v2/repository/index", self._index)
        app.router.add_post("/v2/repository/models/{name}/load", self._load)
        app.router.add_post("/v2/repository/models/{name}/unload", self._unload)
        app.router.add_post("/{name}/engine/drain", self._drain)
        app.router.add_get("/{name}/metrics", self._metrics)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self.url

    async def stop(self) -> None:
        """Ends."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def records(self) -> tuple[WorkerRecord, ...]:
        """Discovery."""
        return tuple(worker(f"{name}-1", triton_model=name, state=one.record, role=self.role, admin_url=f"{self.url}/{name}")
                     for name, one in self.workers.items() if one.record is not None)

    async def _index(self, _: web.Request) -> web.Response:
        entries: list[dict[str, Any]] = [{"name": name, "version": "1", "state": one.state} for name, one in self.workers.items()]
        return web.json_response([*entries, {"name": "router", "version": "1", "state": "READY"}, {"name": "never_loaded"}])

    async def _load(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if self.refuses or self.workers[name].broken:
            return web.json_response({"error": self.refuses or "it is broken"}, status=400)
        self.happened.append(f"load {name}")
        self.workers[name].state = "READY"
        if self.workers[name].registers:
            self.workers[name].record = WorkerState.READY
        return web.Response()

    async def _unload(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        one = self.workers[name]
        self.happened.append(f"unload {name} running={one.running} kv={one.kv_use:g}")
        one.state, one.record = "UNLOADING" if one.stuck else "UNAVAILABLE", None
        return web.Response()

    async def _drain(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.happened.append(f"drain {name}")
        self.workers[name].record = WorkerState.DRAINING
        await asyncio.sleep(0)
        return web.json_response({"aborted": 0})

    async def _metrics(self, request: web.Request) -> web.Response:
        """With every look a request ends; then the KV is pulled."""
        one = self.workers[request.match_info["name"]]
        text = (f'vllm:num_requests_running{{model_name="served"}} {one.running}\nvllm:num_requests_waiting{{model_name="served"}} 0\n'
                f'vllm:kv_cache_usage_perc{{model_name="served"}} {one.kv_use}\n')
        one.running, one.kv_use = max(0, one.running - 1), one.kv_use if one.running else 0.0
        return web.Response(text=text)
