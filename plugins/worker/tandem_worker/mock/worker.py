# SPDX-License-Identifier: Apache-2.0
"""One mock worker in real time: the engine's steps take as long as they say, and its outputs reach their requests.

Everything runs on one event loop. A request that its caller gives up is aborted on the engine at once.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator
from typing import Any

from tandem_protocol.errors import RequestCancelledError, RequestError, UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerState
from tandem_worker.mock.answers import Answer, MockOutput, max_tokens_of, prompt_tokens
from tandem_worker.mock.engine import MockEngine
from tandem_worker.mock.publisher import EventPublisher
from tandem_worker.mock.sequences import EngineRequest, StepResult
from tandem_worker.pacing import stream_interval

_TIMED_OUT = "the request's own timeout ended: allow more time or send it when there is less load"


class WorkerDiedError(UnavailableError):
    """The worker is gone: the connection to it ends, whatever travels on it."""


class MockWorker:
    """One engine, its clock and its requests. Resource handling: `start` begins, `close` or `kill` ends."""

    def __init__(self, name: str, worker_id: str, engine: MockEngine, publisher: EventPublisher | None, die_after: int = 0,
                 response_rate: int = 0) -> None:
        """`die_after`: dies once it has generated so many tokens, never for 0; `response_rate` as in MockOptions."""
        self.name = name
        self.id = worker_id
        self.engine = engine
        self.publisher = publisher
        self.state = WorkerState.STARTING
        self.dead = asyncio.Event()
        self.late_s = 0.0
        """How far the steps began behind their time, in sum: above 0 the host is too slow for this speedup."""
        self._die_after = die_after
        self._response_rate = response_rate
        self._answers: dict[str, Answer] = {}
        self._by_client_id: dict[str, list[str]] = {}
        self._numbers = itertools.count()
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Runs the engine from now on."""
        self._task = asyncio.create_task(self._run(), name=f"engine of {self.name}")
        self.state = WorkerState.READY

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[MockOutput, None]:
        """The answer, in as many parts as the caller takes. Leaving the iteration aborts the request.

        Raises RequestError, UnavailableError (dead or draining), RequestCancelledError.
        """
        key, answer = self._submit(request)
        try:
            async with asyncio.timeout(request.timeout_s):
                while True:
                    output = await answer.take()
                    yield output
                    if output.finished:
                        return
        except TimeoutError as exc:
            raise UnavailableError(_TIMED_OUT) from exc
        finally:
            self._forget(request.request_id, key)

    async def prefill(self, request: GenerationRequest) -> tuple[str, int]:
        """Computes a prompt and keeps its blocks for the decode worker: the engine's request id, and the tokens that were cached."""
        key, answer = self._submit(request)
        try:
            async with asyncio.timeout(request.timeout_s):
                await answer.take()
                return key, answer.cached_tokens
        except TimeoutError as exc:
            self.engine.release_handoff(key)
            raise UnavailableError(_TIMED_OUT) from exc
        except BaseException:
            self.engine.release_handoff(key)
            raise
        finally:
            self._forget(request.request_id, key)

    def abort(self, client_id: str) -> int:
        """Aborts all requests of this client id; returns how many there were."""
        keys = self._by_client_id.get(client_id, [])
        for key in keys:
            self._answers[key].fail(RequestCancelledError(f"request {client_id} was aborted"))
        return len(keys)

    async def kill(self) -> None:
        """Dies as by SIGKILL: every request breaks off, nothing is said of it, the sockets close."""
        self.state = WorkerState.DRAINING
        self.dead.set()
        for answer in self._answers.values():
            answer.fail(WorkerDiedError("Socket closed"))
        await self.close()

    async def close(self) -> None:
        """Stops the engine and closes the event sockets."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.wait([self._task])
        if self.publisher is not None:
            await self.publisher.close()

    @property
    def stream_interval(self) -> int:
        """Tokens per response as a real worker paces them, with the streams that there are now."""
        if not self._response_rate:
            return 1
        streams = len(self._answers)
        return stream_interval(streams, self.engine.decode_step_s(streams), self._response_rate)

    def wake(self) -> None:
        """Has the engine look for work: after anything that was done to it from outside."""
        self._work.set()

    def _submit(self, request: GenerationRequest) -> tuple[str, Answer]:
        if self.state is not WorkerState.READY:
            raise UnavailableError(f"worker {self.name} is {self.state}: send the request to another one")
        tokens, key = prompt_tokens(request), f"{request.request_id or 'request'}-{next(self._numbers)}"
        remote = self._remote_tokens(request.handoff, len(tokens))
        self.engine.submit(EngineRequest(key, tokens, max_tokens_of(request), remote))
        answer = Answer(request.prompt if isinstance(request.prompt, str) else None, len(tokens))
        self._answers[key] = answer
        self._by_client_id.setdefault(request.request_id, []).append(key)
        self.wake()
        return key, answer

    def _remote_tokens(self, handoff: dict[str, Any] | None, length: int) -> int:
        if handoff is None:
            return 0
        tokens = handoff.get("remote_num_tokens")
        if not isinstance(tokens, int) or tokens < length:
            raise RequestError(f"the handoff is of {tokens} tokens and the prompt has {length}: send decode the prompt that prefill had")
        return length

    def _forget(self, client_id: str, key: str) -> None:
        del self._answers[key]
        self._by_client_id[client_id].remove(key)
        if not self._by_client_id[client_id]:
            del self._by_client_id[client_id]
        if self.engine.abort(key):
            self.wake()

    async def _run(self) -> None:
        due = time.monotonic()
        while not self.dead.is_set():
            self._work.clear()
            result = self.engine.step(max(due, time.monotonic()))
            if result.busy_s:
                due = result.next_time or due
                await self._sleep_until(due)
                self._deliver(result)
            else:
                self._publish(result)
                await self._idle(result.next_time)
            if self._die_after and self.engine.counts.generated_tokens >= self._die_after:
                await self.kill()

    async def _sleep_until(self, due: float) -> None:
        late = time.monotonic() - due
        self.late_s += max(0.0, late)
        await asyncio.sleep(max(0.0, -late))

    async def _idle(self, until: float | None) -> None:
        timeout = None if until is None else max(0.0, until - time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._work.wait()

    def _deliver(self, result: StepResult) -> None:
        self._publish(result)
        for output in result.outputs:
            answer = self._answers.get(output.request_id)
            if answer is not None:  # else its caller went away during this step
                answer.push(output)

    def _publish(self, result: StepResult) -> None:
        if self.publisher is not None:
            self.publisher.publish(result.events)

    @property
    def is_decoupled(self) -> bool:
        """Whether it answers with a stream."""
        return self.engine.settings.role is not Role.PREFILL
