# SPDX-License-Identifier: Apache-2.0
"""Replays a trace in virtual time: mock engines, and the router's own placement and index in front of them.

Nothing is simulated of the router: `Placement` decides, `KvIndex` is fed the engines' events, block keys are hashed from the prompts'
tokens, and the time of a decision is the wall clock's. Requests, events and answers travel in no time.
"""

import heapq
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from benchmarks.errors import BenchmarkError
from benchmarks.traces import TraceRequest, ideal_hits, tokens_of
from tandem_protocol.blocks import hash_blocks
from tandem_protocol.roles import Role
from tandem_protocol.workers import EventSource, WorkerRecord, WorkerState
from tandem_router.config import RouterMode, RouterSettings
from tandem_router.index import KvIndex
from tandem_router.placement import Placement, RouteRequest
from tandem_worker.mock.engine import MockEngine
from tandem_worker.mock.sequences import EngineRequest, StepResult
from tandem_worker.mock.settings import EngineSettings
from tandem_worker.mock.timing import StepTiming

MODES: dict[str, RouterSettings] = {
    "kv": RouterSettings(),
    "approximate": RouterSettings(kv_events=False),
    "round-robin": RouterSettings(router_mode=RouterMode.ROUND_ROBIN),
    "random": RouterSettings(router_mode=RouterMode.RANDOM),
    "power-of-two": RouterSettings(router_mode=RouterMode.POWER_OF_TWO),
    "least-loaded": RouterSettings(router_mode=RouterMode.LEAST_LOADED),
}
"""Name -> the router's settings, all defaults but for the mode."""


@dataclass(frozen=True)
class Outcome:
    """What one replay gave. Times in seconds of the trace, but for decisions and hashing, which are milliseconds of this machine."""

    hit: float
    """Share of all prompt tokens that the engines' caches had."""
    ttft_p50_s: float
    ttft_p99_s: float
    load_spread: float
    """Busiest worker against the mean; load is the time of a worker's steps, without the fixed part that every step has."""
    busy: float
    """Mean share of the time in which a worker ran a step, over the arrivals' time."""
    preemptions: int
    decision_p50_ms: float
    decision_p99_ms: float
    decision_cpu_p99_ms: float
    """Processor time of the deciding thread: what the wall clock would say on a machine that does nothing else."""
    hashing_p99_ms: float
    drain_s: float
    """From the last arrival to the last answer: long where a mode fell behind."""
    wall_s: float


@dataclass
class _Worker:
    """One mock engine and what is measured of it."""

    id: str
    engine: MockEngine
    slot: int = 0
    active: bool = False
    busy_s: float = 0.0
    work_s: float = 0.0


@dataclass
class _Measured:
    arrivals: dict[str, float] = field(default_factory=dict)
    tickets: dict[str, int] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)
    decision_s: list[float] = field(default_factory=list)
    decision_cpu_s: list[float] = field(default_factory=list)
    hashing_s: list[float] = field(default_factory=list)


class Replay:
    """One mode over one fleet. Use once."""

    def __init__(self, settings: RouterSettings, workers: int, engine: EngineSettings, timing: StepTiming, seed: int = 0) -> None:
        self._now = 0.0
        self._timing, self._block_size = timing, engine.block_size
        self._index = KvIndex()
        self._placement = Placement(settings, Role.AGGREGATED, self._index, lambda: self._now, random.Random(seed))
        fleet = (_Worker(f"mock-{number}", MockEngine(engine, timing, milestones_only=True)) for number in range(workers))
        self._workers = {worker.id: worker for worker in fleet}
        self._placement.set_workers([_record(worker, engine) for worker in self._workers.values()])
        for worker in self._workers.values():
            worker.slot = self._index.add_worker(worker.id, 0)
        self._reads_events = settings.reads_events
        self._ends: list[tuple[float, int, _Worker, StepResult]] = []
        self._steps = 0
        self._measured = _Measured()

    def run(self, trace: Sequence[TraceRequest]) -> Outcome:
        """Replays the trace until the last answer is complete."""
        began = time.perf_counter()
        for number, item in enumerate(trace):
            self._run_until(item.timestamp / 1000)
            self._arrive(str(number), item)
        arrivals_s = self._now
        self._run_until(float("inf"))
        return self._outcome(trace, arrivals_s, time.perf_counter() - began)

    def _run_until(self, until: float) -> None:
        """Everything that happens up to this time."""
        while self._ends and self._ends[0][0] <= until:
            self._now, _, worker, result = heapq.heappop(self._ends)
            self._complete(worker, result)
            self._step(worker)
        if until != float("inf"):
            self._now = until

    def _arrive(self, name: str, item: TraceRequest) -> None:
        tokens = tokens_of(item)
        before = time.perf_counter()
        keys = hash_blocks(tokens, self._block_size)
        hashed, hashed_cpu = time.perf_counter(), time.thread_time()
        decision = self._placement.choose(RouteRequest(len(tokens), keys))
        self._measured.decision_cpu_s.append(time.thread_time() - hashed_cpu)
        self._measured.decision_s.append(time.perf_counter() - hashed)
        self._measured.hashing_s.append(hashed - before)
        self._measured.arrivals[name] = self._now
        self._measured.tickets[name] = decision.ticket
        worker = self._workers[decision.worker.id]
        worker.engine.submit(EngineRequest(name, tokens, item.output_length))
        if not worker.active:
            self._step(worker)

    def _step(self, worker: _Worker) -> None:
        """Begins the worker's next step; an engine without work sleeps until a request comes."""
        result = worker.engine.step(self._now)
        worker.active = result.next_time is not None
        if result.next_time is None:
            self._apply(worker, result)
            return
        self._steps += 1
        heapq.heappush(self._ends, (result.next_time, self._steps, worker, result))

    def _complete(self, worker: _Worker, result: StepResult) -> None:
        self._apply(worker, result)
        if result.busy_s:
            worker.busy_s += result.busy_s
            worker.work_s += result.busy_s - self._timing.step_s / self._timing.speedup
        for output in result.outputs:
            if output.index == 0:
                self._measured.ttft_s.append(self._now - self._measured.arrivals.pop(output.request_id))
                self._placement.prefill_done(self._measured.tickets[output.request_id])
            if output.finished:
                self._placement.free(self._measured.tickets.pop(output.request_id))

    def _apply(self, worker: _Worker, result: StepResult) -> None:
        if self._reads_events:
            for event in result.events:
                self._index.apply(worker.slot, event)

    def _outcome(self, trace: Sequence[TraceRequest], arrivals_s: float, wall_s: float) -> Outcome:
        counts = [worker.engine.counts for worker in self._workers.values()]
        work = np.array([worker.work_s for worker in self._workers.values()])
        measured = self._measured
        if measured.tickets:
            raise BenchmarkError(f"{len(measured.tickets)} requests were never answered: the mock engine stalled, report the seed")
        return Outcome(
            hit=sum(count.cached_tokens for count in counts) / sum(item.input_length for item in trace),
            ttft_p50_s=_percentile(measured.ttft_s, 50), ttft_p99_s=_percentile(measured.ttft_s, 99),
            load_spread=float(work.max() / work.mean()),
            busy=sum(worker.busy_s for worker in self._workers.values()) / len(self._workers) / self._now,
            preemptions=sum(count.preemptions for count in counts),
            decision_p50_ms=1000 * _percentile(measured.decision_s, 50), decision_p99_ms=1000 * _percentile(measured.decision_s, 99),
            decision_cpu_p99_ms=1000 * _percentile(measured.decision_cpu_s, 99),
            hashing_p99_ms=1000 * _percentile(measured.hashing_s, 99), drain_s=self._now - arrivals_s, wall_s=wall_s,
        )


def _record(worker: _Worker, engine: EngineSettings) -> WorkerRecord:
    return WorkerRecord(
        id=worker.id, role=Role.AGGREGATED, state=WorkerState.READY, model="mock", grpc_url="", triton_model=worker.id,
        event_sources=(EventSource(dp_rank=0, endpoint="virtual"),), block_size=engine.block_size, total_blocks=engine.total_blocks,
        max_num_seqs=engine.max_num_seqs, max_num_batched_tokens=engine.max_num_batched_tokens,
    )


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share))


def work_s(trace: Sequence[TraceRequest], hits: Sequence[int], timing: StepTiming) -> float:
    """Seconds of one worker that the trace takes with these hits, without the fixed part of every step."""
    total = 0.0
    for item, hit in zip(trace, hits, strict=True):
        new, context = item.input_length - hit, item.input_length + item.output_length / 2
        total += timing.prefill_token_s * new + timing.attention_pair_s * new * (hit + new / 2)
        total += item.output_length * (timing.decode_sequence_s + timing.context_token_s * context)
    return total / timing.speedup


def at_rate(trace: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """The trace `factor` times as fast: a file's own times rarely load a fleet of another size."""
    return [msgspec.structs.replace(item, timestamp=(item.timestamp - trace[0].timestamp) / factor) for item in trace]


def load_of(trace: Sequence[TraceRequest], workers: int, timing: StepTiming) -> float:
    """Offered load: `work_s` with an infinite cache, over the workers' time from the first to the last arrival."""
    return work_s(trace, ideal_hits(trace), timing) / workers / ((trace[-1].timestamp - trace[0].timestamp) / 1000)
