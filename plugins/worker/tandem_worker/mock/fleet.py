# SPDX-License-Identifier: Apache-2.0
"""The mock workers of one process: made from options, found by model name or engine id, known to discovery."""

import asyncio
import logging
import uuid
from collections.abc import Iterator

import aiohttp

from tandem_protocol.discovery import LEASE_TTL_S, Discovery, Registration
from tandem_protocol.errors import RequestError
from tandem_protocol.workers import WorkerRecord, WorkerState
from tandem_worker.mock.engine import MockEngine
from tandem_worker.mock.options import MockOptions
from tandem_worker.mock.publisher import EventPublisher
from tandem_worker.mock.worker import MockWorker

log = logging.getLogger(__name__)

_RELEASE_TIMEOUT_S = 2.0


class Fleet:
    """All workers of the process. Resource handling: `start`, then `close`."""

    def __init__(self, options: MockOptions) -> None:
        self.options = options
        self.admin_address = ""
        self._workers: dict[str, MockWorker] = {}
        self._registrations: list[Registration] = []
        self._mourning: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[MockWorker]:
        return iter(self._workers.values())

    def start(self) -> None:
        """Makes and starts every worker. Raises ConfigError for ports that are taken."""
        run = uuid.uuid4().hex[:8]
        for index in range(self.options.workers):
            worker = self._make(index, f"{self.options.name}-{run}-{index}")
            self._workers[worker.name] = worker
            worker.start()

    def _make(self, index: int, worker_id: str) -> MockWorker:
        chosen = self.options
        base = chosen.event_port + 2 * index if chosen.event_port else 0
        publisher = EventPublisher(chosen.host, base, base and base + 1) if chosen.events else None
        die_after = chosen.die_after if index == chosen.die_worker else 0
        name = chosen.name if chosen.exact_name else f"{chosen.name}_{index}"
        return MockWorker(name, worker_id, MockEngine(chosen.engine, chosen.timing), publisher, die_after,
                          chosen.response_rate)

    def find(self, model: str) -> MockWorker | None:
        """A worker by its model name, dead or alive."""
        return self._workers.get(model)

    def at(self, index: int) -> MockWorker:
        """A worker by its number; raises RequestError."""
        workers = list(self)
        if not 0 <= index < len(workers):
            raise RequestError(f"there is no worker {index}: this process has 0 to {len(workers) - 1}")
        return workers[index]

    def release_here(self, engine_id: str, request_id: str) -> bool:
        """Frees the blocks of a handoff of one of these workers."""
        for worker in self:
            if worker.id == engine_id:
                released = worker.engine.release_handoff(request_id)
                worker.wake()
                return released
        return False

    async def release(self, handoff: dict[str, object]) -> None:
        """Tells the prefill worker of a handoff that its blocks were taken, or never will be; its lease is the last resort."""
        engine_id, request_id = str(handoff.get("remote_engine_id")), str(handoff.get("remote_request_id"))
        address = f"{handoff.get('remote_host')}:{handoff.get('remote_port')}"
        if address == self.admin_address:
            self.release_here(engine_id, request_id)
            return
        body = {"engine_id": engine_id, "request_id": request_id}
        timeout = aiohttp.ClientTimeout(total=_RELEASE_TIMEOUT_S)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, session.post(f"http://{address}/mock/release", json=body):
                pass
        except (aiohttp.ClientError, TimeoutError) as exc:
            log.warning("mock.release_failed address=%s error=%s: the prefill worker's lease will free the blocks", address, exc)

    async def register(self, discovery: Discovery, grpc_address: str) -> None:
        """Registers every worker. A worker that dies stays listed for one lease, as one that crashed."""
        for worker in self:
            registration = await discovery.register(self.record(worker, grpc_address))
            self._registrations.append(registration)
            task = asyncio.create_task(_mourn(worker, registration))
            self._mourning.add(task)
            task.add_done_callback(self._mourning.discard)

    def record(self, worker: MockWorker, grpc_address: str) -> WorkerRecord:
        """What discovery is told of a worker."""
        settings = worker.engine.settings
        return WorkerRecord(
            id=worker.id, role=settings.role, state=worker.state, model=self.options.model, grpc_url=grpc_address, triton_model=worker.name,
            admin_url=f"http://{self.admin_address}", event_sources=(worker.publisher.source,) if worker.publisher else (),
            block_size=settings.block_size, total_blocks=settings.total_blocks, max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens, speculation=settings.speculation,
        )

    async def drain(self, worker: MockWorker) -> None:
        """The worker takes no more requests; those that it has go on."""
        worker.state = WorkerState.DRAINING
        for registration in self._registrations:
            if registration.record.id == worker.id:
                await registration.set_state(WorkerState.DRAINING)

    async def close(self) -> None:
        """Removes the workers from discovery and stops them."""
        for task in list(self._mourning):
            task.cancel()
        for registration in self._registrations:
            await registration.close()
        for worker in self:
            if not worker.dead.is_set():
                await worker.close()


async def _mourn(worker: MockWorker, registration: Registration) -> None:
    await worker.dead.wait()
    await asyncio.sleep(LEASE_TTL_S)
    await registration.close()
