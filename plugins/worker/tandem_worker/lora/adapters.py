# SPDX-License-Identifier: Apache-2.0
"""The adapters of one worker: loaded once, whoever asks how often; held while requests use them; unloaded when nobody does.

Runs on the worker's event loop; files are fetched on two threads of its own. What holds whatever fails: an adapter is either in the
engine, in the list and its files in place, or it is gone from all three; loads of one name go one after the other.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from prometheus_client import Counter, Gauge

from tandem_protocol.errors import RequestError, TandemError, UnavailableError
from tandem_worker.lora.adapter import Adapter, AdapterConflictError, UnknownAdapterError, check_name, lora_id
from tandem_worker.lora.deadline import Deadline
from tandem_worker.lora.source import Source, parse_source
from tandem_worker.lora.store import Copy
from tandem_worker.lora.terms import CopySource, Limits, Loaded, LoraEngine
from tandem_worker.lora.turns import Turns
from tandem_worker.status import WorkerState

log = logging.getLogger(__name__)

_THREADS = 2
_MOST_PENDING = 64
_CLOSE_TIMEOUT_S = 5.0
CHANGEABLE = frozenset({WorkerState.STARTING, WorkerState.READY, WorkerState.UNWELL})
"""States of a worker in which its engine takes changes of adapters."""
LOADS = Counter("tandem_lora_loads", "Requests to load an adapter, by outcome: loaded, present, refused, unavailable", ["outcome"])
UNLOADS = Counter("tandem_lora_unloads", "Adapters that were unloaded")
LISTED = Gauge("tandem_lora_adapters", "Adapters that requests may name")
for _outcome in ("loaded", "present", "refused", "unavailable"):
    LOADS.labels(_outcome)


@dataclass
class _Entry:
    adapter: Adapter
    copy: Copy | None = None
    """None for one of multi_lora.json: its files are where the operator put them."""
    in_engine: bool = True
    users: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Adapters:
    """All of one worker's. `close` before the engine ends, `release` after it."""

    def __init__(self, engine: LoraEngine, source: CopySource, limits: Limits, static: Sequence[Adapter] = ()) -> None:
        self._engine, self._source, self._limits = engine, source, limits
        self._entries = {adapter.name: _Entry(adapter, in_engine=False) for adapter in static}
        self._turns = Turns()
        self._tasks: set[asyncio.Task[Loaded]] = set()
        self._loading: set[str] = set()
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tandem-lora")
        self._tell: Callable[[tuple[str, ...]], None] = lambda _: None
        self._resting: Callable[[], str] = lambda: ""
        LISTED.set_function(lambda: len(self._entries))

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name, in the order of loading."""
        return tuple(self._entries)

    @property
    def listing(self) -> tuple[Adapter, ...]:
        """All of them."""
        return tuple(entry.adapter for entry in self._entries.values())

    def follow(self, tell: Callable[[tuple[str, ...]], None]) -> None:
        """`tell` gets the names now and after each change, on the event loop."""
        self._tell = tell
        tell(self.names)

    def rest_while(self, why: Callable[[], str]) -> None:
        """Nothing is loaded or unloaded while `why` names another state than serving: a sleeping engine hasn't the memory for it."""
        self._resting = why

    @asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Adapter | None]:
        """Holds the adapter that a request names: it stays loaded until the block ends. Raises RequestError in vllm_backend's words."""
        if name is None:
            yield None
            return
        entry = self._entry(name)
        with _held(entry):
            if not entry.in_engine:
                await self._bring(entry)
            yield entry.adapter

    async def load(self, name: object, uri: object) -> Loaded:
        """Loads once, however many ask at the same time; ends also if the caller is cancelled.

        Raises RequestError for what can't be loaded (AdapterConflictError: its name is taken), UnavailableError for what may work later.
        """
        try:
            self._check_enabled()
            checked, source = check_name(name), parse_source(uri)
            if self._stop.is_set():
                raise UnavailableError("the worker is shutting down: load the adapter on another one")
            if len(self._tasks) >= _MOST_PENDING:
                raise UnavailableError(f"{_MOST_PENDING} loads are waiting already: retry later")
            task = asyncio.get_running_loop().create_task(self._load(checked, source))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            loaded = await asyncio.shield(task)
        except TandemError as exc:
            LOADS.labels("unavailable" if isinstance(exc, UnavailableError) else "refused").inc()
            log.warning("lora.not_loaded name=%s uri=%s reason=%s", name, uri, exc)
            raise
        LOADS.labels("loaded" if loaded.fresh else "present").inc()
        return loaded

    async def unload(self, name: str) -> Adapter:
        """Takes it from the list, waits for the requests that use it, and unloads it. Raises UnknownAdapterError, or UnavailableError:
        then it is in the list again."""
        self._check_enabled()
        async with self._turns.taking(name, self._limits.load_timeout_s):
            entry = self._entries.pop(name, None)
            if entry is None:
                raise UnknownAdapterError(f"LoRA adapter {name!r} is not loaded: loaded are {', '.join(self.names) or 'none'}")
            self._tell(self.names)
            try:
                await self._wait_unused(entry)
                self._check_awake()
                await self._engine.remove(entry.adapter)
            except BaseException:
                self._entries[name] = entry
                self._tell(self.names)
                raise
            if entry.copy is not None:
                self._source.release(entry.copy)
        UNLOADS.inc()
        log.info("lora.unloaded name=%s", name)
        return entry.adapter

    async def close(self) -> None:
        """Takes no more loads and ends those that are under way; repeating it does nothing."""
        self._stop.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def release(self) -> None:
        """Gives the copies back: when the engine has ended, from any thread."""
        for entry in self._entries.values():
            copy, entry.copy = entry.copy, None
            if copy is not None:
                self._source.release(copy)

    def _check_enabled(self) -> None:
        if not self._limits.enabled:
            raise RequestError("adapters can't be changed at run time here: start the worker with DYN_LORA_ENABLED=true")
        if not self._engine.takes_loras:
            raise RequestError("LoRA feature is not enabled. Start the engine with --enable-lora")

    def _check_awake(self) -> None:
        if state := self._resting():
            raise UnavailableError(f"the worker is {state}: adapters change only while it serves")

    def _entry(self, name: str) -> _Entry:
        """The two messages are those of Triton's vllm_backend, which its clients match on."""
        if not self._engine.takes_loras:
            raise RequestError("LoRA feature is not enabled.")
        if name not in self._entries:
            raise RequestError(f"LoRA {name} is not supported, we currently support {list(self._entries)}")
        return self._entries[name]

    async def _bring(self, entry: _Entry) -> None:
        """An adapter of multi_lora.json is loaded at its first use: if its files are bad, that costs this request and no other."""
        async with self._turns.taking(entry.adapter.name, self._limits.load_timeout_s):
            if not entry.in_engine:
                await self._add(entry.adapter)
                entry.in_engine = True

    async def _load(self, name: str, source: Source) -> Loaded:
        deadline = Deadline(self._limits.load_timeout_s, self._stop)
        async with self._turns.taking(name, deadline.left_s()):
            present = self._entries.get(name)
            if present is not None:
                return self._present(present, source)
            self._check_room(name)
            self._loading.add(name)
            try:
                entry = await self._fetch_and_add(name, source, deadline)
            finally:
                self._loading.discard(name)
            self._entries[name] = entry
        self._tell(self.names)
        log.info("lora.loaded name=%s id=%d uri=%s", name, entry.adapter.id, source.uri)
        return Loaded(entry.adapter, fresh=True)

    def _present(self, entry: _Entry, source: Source) -> Loaded:
        if entry.adapter.uri != source.uri:
            raise AdapterConflictError(f"LoRA adapter {entry.adapter.name!r} is loaded from {entry.adapter.uri}: "
                                       "unload it first, or take another name")
        return Loaded(entry.adapter, fresh=False)

    def _check_room(self, name: str) -> None:
        taken = {lora_id(other): other for other in (*self._entries, *self._loading)}
        if lora_id(name) in taken:
            raise AdapterConflictError(f"{name!r} has the same number as {taken[lora_id(name)]!r}: take another name")
        if len(taken) >= self._limits.most:
            raise UnavailableError(f"{len(taken)} adapters are loaded (TANDEM_LORA_MAX_ADAPTERS): unload one first")

    async def _fetch_and_add(self, name: str, source: Source, deadline: Deadline) -> _Entry:
        # The thread ends by the deadline itself; it is not left behind, since what it fetched would be nobody's.
        copy = await asyncio.get_running_loop().run_in_executor(self._threads, self._source.fetch, source, deadline)
        try:
            adapter = Adapter(name, lora_id(name), str(copy.path), source.uri)
            await self._add(adapter)
        except BaseException:
            self._source.release(copy)
            raise
        return _Entry(adapter, copy)

    async def _add(self, adapter: Adapter) -> None:
        """Leaves nothing of it in the engine if that fails."""
        self._check_awake()
        try:
            await self._engine.add(adapter)
        except BaseException:
            try:
                await self._engine.remove(adapter)
            except TandemError:
                log.exception("lora.rollback_failed name=%s", adapter.name)
            raise

    async def _wait_unused(self, entry: _Entry) -> None:
        if not entry.users:
            return
        entry.idle.clear()
        try:
            async with asyncio.timeout(self._limits.unload_timeout_s):
                await entry.idle.wait()
        except TimeoutError as exc:
            raise UnavailableError(f"{entry.users} requests still use {entry.adapter.name!r} after {self._limits.unload_timeout_s:g} s: "
                                   "retry later") from exc


@contextmanager
def _held(entry: _Entry) -> Iterator[None]:
    entry.users += 1
    try:
        yield
    finally:
        entry.users -= 1
        if not entry.users:
            entry.idle.set()
