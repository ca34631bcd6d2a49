# SPDX-License-Identifier: Apache-2.0
"""The load generator: processes that keep a fixed number of requests in flight (closed loop) and note every arrival.

Each process has one event loop and its own connections; they warm up, report ready, start at the same instant, and send
their traces back through a pipe. `inproc` uses the same machinery with one process that holds the engine itself.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from benchmarks.errors import BenchmarkError
from benchmarks.measures import Chunk, Figures, Trace, figures

START_LEAD_S = 0.2
"""From the `go` of the parent to the common start: longer than a message through a pipe takes on a busy machine."""
CONNECT_TIMEOUT_S = 60.0
"""A client process imports its libraries and connects; seconds on a loaded machine."""
STOP_TIMEOUT_S = 30.0

TokenStream = Callable[[str, int], AsyncIterator[int]]
"""Sends a prompt, asks for exactly so many tokens, and yields the number of tokens in each chunk as it arrives."""


class TokenSource(Protocol):
    """Where tokens come from; picklable, since it is opened in the load process."""

    def open(self) -> AbstractAsyncContextManager[TokenStream]:
        """Connects (or starts the engine) for the length of the context."""
        ...


@dataclass(frozen=True)
class Job:
    """One measurement, or one process's share of it."""

    warmup: tuple[str, ...]
    prompts: tuple[str, ...]
    concurrency: int
    output_tokens: int
    timeout_s: float
    """Bound of the warm-up, and again of the measured part."""
    ramp_s: float = 0.0
    """The slots start spread over this time: with equal lengths they would else stay in step, and every TTFT be that of a burst."""


@dataclass(frozen=True)
class _Result:
    traces: tuple[Trace, ...]
    cpu_s: float


@dataclass(frozen=True)
class _Failure:
    reason: str


def split(job: Job, processes: int) -> list[Job]:
    """Shares of at most `processes` processes, by slots: request k runs in slot k mod concurrency, slot s in process s mod n."""
    count = min(processes, job.concurrency)
    return [
        replace(
            job,
            warmup=tuple(_share(job.warmup, i, count, job.concurrency)),
            prompts=tuple(_share(job.prompts, i, count, job.concurrency)),
            concurrency=len(range(i, job.concurrency, count)),
        )
        for i in range(count)
    ]


def _share(prompts: Sequence[str], index: int, count: int, slots: int) -> Iterator[str]:
    return (prompt for k, prompt in enumerate(prompts) if k % slots % count == index)


# --- in a load process ---


async def closed_loop(stream: TokenStream, prompts: Sequence[str], concurrency: int, output_tokens: int, timeout_s: float,
                      ramp_s: float = 0.0) -> list[Trace]:
    """Keeps `concurrency` requests in flight until all prompts are answered. Raises BenchmarkError on the first failure."""
    pending, traces = iter(prompts), []

    async def slot(index: int) -> None:
        await asyncio.sleep(ramp_s * index / concurrency)
        for prompt in pending:
            traces.append(await _trace(stream, prompt, output_tokens))  # noqa: PERF401 - each counts as soon as it is there

    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
            for index in range(min(concurrency, len(prompts))):
                group.create_task(slot(index))
    except TimeoutError as exc:
        raise BenchmarkError(f"only {len(traces)} of {len(prompts)} requests were answered within {timeout_s:g} s") from exc
    except ExceptionGroup as exc:
        first = exc.exceptions[0]
        raise BenchmarkError(str(first) if isinstance(first, BenchmarkError) else f"{type(first).__name__}: {first}") from exc
    return traces


async def _trace(stream: TokenStream, prompt: str, output_tokens: int) -> Trace:
    start = time.monotonic()
    chunks = [Chunk(time.monotonic(), tokens) async for tokens in stream(prompt, output_tokens) if tokens]
    trace = Trace(start, tuple(chunks), time.monotonic())
    if trace.tokens != output_tokens:
        raise BenchmarkError(f"a stream carried {trace.tokens} tokens instead of {output_tokens}")
    return trace


def load_process(connection: Connection, source: TokenSource, log: Path) -> None:
    """Entry point of a load process; its output goes to `log`, and its children share its process group."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    try:
        import uvloop  # as vLLM's own server runs

        uvloop.run(_serve(connection, source))
    except EOFError:
        pass  # the parent is gone
    except Exception as exc:
        connection.send(_Failure(f"{type(exc).__name__}: {exc}"))
        raise


async def _serve(connection: Connection, source: TokenSource) -> None:
    async with source.open() as stream:
        gc.collect()
        gc.freeze()  # collections of the imported libraries' objects would show as jitter
        connection.send("started")
        while (job := await asyncio.to_thread(connection.recv)) is not None:
            try:
                connection.send(await _run(connection, stream, job))
            except BenchmarkError as exc:
                connection.send(_Failure(str(exc)))


async def _run(connection: Connection, stream: TokenStream, job: Job) -> _Result:
    if job.warmup:
        await closed_loop(stream, job.warmup, job.concurrency, job.output_tokens, job.timeout_s)
    connection.send("ready")
    start = await asyncio.to_thread(connection.recv)
    if start is None:
        raise BenchmarkError("called off: another load process failed while warming up")
    await asyncio.sleep(start - time.monotonic())
    cpu = time.process_time()
    traces = await closed_loop(stream, job.prompts, job.concurrency, job.output_tokens, job.timeout_s, job.ramp_s)
    return _Result(tuple(traces), time.process_time() - cpu)


# --- in the parent ---


class _Handle:
    """The parent's end of one load process."""

    def __init__(self, source: TokenSource, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = log
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=load_process, args=(theirs, source, log))
        self.process.start()
        theirs.close()

    def receive(self, timeout_s: float) -> Any:
        """The next message; raises BenchmarkError for a failure, a dead process or silence."""
        try:
            if not self.connection.poll(timeout_s):
                raise BenchmarkError(f"no answer within {timeout_s:g} s, see {self._log}")
            message = self.connection.recv()
        except (EOFError, ConnectionError) as exc:
            raise BenchmarkError(f"the process ended, see {self._log}") from exc
        if isinstance(message, _Failure):
            raise BenchmarkError(f"{message.reason} (log: {self._log})")
        return message

    def stop(self) -> None:
        """Asks the process to end, then ends its whole group, engine processes included."""
        with suppress(OSError):
            self.connection.send(None)
        self.process.join(STOP_TIMEOUT_S)
        if self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # in case it didn't get as far as a group of its own
        self.process.join(STOP_TIMEOUT_S)
        self.connection.close()


class LoadGenerator:
    """Load processes on one source, for the length of a `with`; reused for all levels."""

    def __init__(self, source: TokenSource, processes: int, logs: Path, start_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._source = source
        self._logs = [logs.with_name(f"{logs.name}-{i}.log") for i in range(processes)]
        self._start_timeout_s = start_timeout_s
        self._handles: list[_Handle] = []

    def __enter__(self) -> Self:
        try:
            for log in self._logs:
                self._handles.append(_Handle(self._source, log))
            for handle in self._handles:
                handle.receive(self._start_timeout_s)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    @property
    def pids(self) -> tuple[int, ...]:
        """The load processes."""
        return tuple(handle.process.pid for handle in self._handles if handle.process.pid is not None)

    def measure(self, job: Job) -> Figures:
        """Runs one job over the processes. After a BenchmarkError the generator must not be used again."""
        active = list(zip(self._handles, split(job, len(self._handles)), strict=False))
        for handle, share in active:
            handle.connection.send(share)
        for handle, _ in active:
            handle.receive(job.timeout_s + CONNECT_TIMEOUT_S)
        start = time.monotonic() + START_LEAD_S
        for handle, _ in active:
            handle.connection.send(start)
        results: list[_Result] = [handle.receive(job.timeout_s + CONNECT_TIMEOUT_S) for handle, _ in active]
        return figures([trace for result in results for trace in result.traces], [result.cpu_s for result in results])

    def _stop(self) -> None:
        for handle in self._handles:
            handle.stop()
        self._handles.clear()
