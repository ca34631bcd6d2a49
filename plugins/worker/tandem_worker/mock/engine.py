# SPDX-License-Identifier: Apache-2.0
"""A pure discrete-event simulation of one vLLM engine: continuous batching over a block-wise prefix cache.

Follows vLLM's V1 scheduler: running requests first, then waiting ones in order of arrival, within `max_num_batched_tokens`
(long prompts in chunks) and `max_num_seqs`; a request is admitted only when its whole prompt fits above the watermark;
when a running request finds no block, the youngest is preempted and recomputed later. Blocks are cached as they are
scheduled and stay cached until needed (`blocks.py`).

It knows no clock: `step(now)` begins a step at `now` and says when it ends; its outputs and events are due then. So it runs
in virtual time (benchmarks) as in real time (`worker.py`). One caller at a time.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tandem_protocol.errors import EngineError, RequestError
from tandem_protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from tandem_protocol.roles import Role
from tandem_worker.mock.blocks import BlockPool
from tandem_worker.mock.sequences import EngineCounts, EngineOutput, EngineRequest, Sequence, StepResult
from tandem_worker.mock.settings import EngineSettings
from tandem_worker.mock.timing import BatchShape, StepTiming
from tandem_worker.mock.tokens import TokenChain


@dataclass(slots=True)
class _Batch:
    budget: int
    prefill_tokens: int = 0
    attention_pairs: float = 0.0
    decode_sequences: int = 0
    context_tokens: int = 0
    emitting: list[Sequence] = field(default_factory=list)
    preempted: bool = False

    def shape(self) -> BatchShape:
        return BatchShape(self.prefill_tokens, self.attention_pairs, self.decode_sequences, self.context_tokens)


class MockEngine:
    """One simulated engine."""

    def __init__(self, settings: EngineSettings, timing: StepTiming, *, milestones_only: bool = False) -> None:
        """`milestones_only`: outputs tell of each request's first and last token only, which is all that a replay looks at."""
        self.settings = settings
        self._milestones_only = milestones_only
        self.counts = EngineCounts()
        self._timing = timing
        self._pool = BlockPool(settings.total_blocks)
        self._watermark_blocks = int(settings.watermark * settings.total_blocks)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._transferring: list[Sequence] = []
        self._arrived: deque[Sequence] = deque()
        self._held: dict[str, tuple[Sequence, float]] = {}
        self._link_free_at = 0.0
        self._events: list[Event] = []

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests not in the batch: queued, preempted, or waiting for their KV."""
        return len(self._waiting) + len(self._transferring) + len(self._arrived)

    def decode_step_s(self, sequences: int) -> float:
        """Seconds of a step in which so many sequences decode, their contexts left out."""
        return self._timing.seconds(BatchShape(decode_sequences=sequences))

    @property
    def held_handoffs(self) -> int:
        """Finished prefills whose blocks wait for a decode worker."""
        return len(self._held)

    @property
    def used_blocks(self) -> int:
        """Blocks that can't be allocated now."""
        return self._pool.total - self._pool.free

    def cached_hashes(self) -> list[int]:
        """Hashes of all cached blocks; what a reader of all events up to now must have."""
        return self._pool.cached_hashes()

    def submit(self, request: EngineRequest) -> None:
        """Queues a request. Raises RequestError for one that could never run."""
        length, room = len(request.prompt), self.settings.max_model_len
        if length < 1 or request.max_tokens < 1:
            raise RequestError("the prompt and max_tokens must be at least one token")
        if length + request.max_tokens > room:
            raise RequestError(f"{length} prompt tokens and max_tokens={request.max_tokens} exceed the model's {room}: shorten either")
        if self._blocks_of(length + request.max_tokens) > self._pool.total:
            raise RequestError(f"{length + request.max_tokens} tokens do not fit into {self._pool.total} KV blocks: shorten the request")
        chain = TokenChain(request.prompt, self.settings.block_size, self.settings.vocabulary)
        self._waiting.append(Sequence(request, chain, 1 if self.settings.role is Role.PREFILL else request.max_tokens))

    def abort(self, request_id: str) -> bool:
        """Drops a request and frees its blocks; False if it isn't here. Outputs of a step under way may still name it."""
        for queue in (self._waiting, self._running, self._transferring, self._arrived):
            for sequence in queue:
                if sequence.request.request_id == request_id:
                    queue.remove(sequence)
                    self._pool.release(sequence.blocks)
                    return True
        return False

    def release_handoff(self, request_id: str) -> bool:
        """Frees the blocks of a finished prefill: its decode worker has them, or will not come."""
        held = self._held.pop(request_id, None)
        if held is not None:
            self._pool.release(held[0].blocks)
        return held is not None

    def clear_cache(self) -> bool:
        """Forgets the prefix cache; refused (False) while requests hold blocks. The event comes with the next step."""
        cleared = self._pool.clear()
        if cleared:
            self._events.append(AllBlocksCleared())
        return cleared

    def step(self, now: float) -> StepResult:
        """Schedules one step that begins at `now` (seconds on the caller's clock, never earlier than before)."""
        self._expire_handoffs(now)
        self._take_arrivals(now)
        batch = _Batch(self.settings.max_num_batched_tokens)
        self._schedule_running(batch)
        if not batch.preempted:
            self._schedule_waiting(batch, now)
        return self._finish(batch, now)

    def _finish(self, batch: _Batch, now: float) -> StepResult:
        if batch.budget == self.settings.max_num_batched_tokens:
            # Whoever was preempted alone gets its turn in the next step.
            return StepResult(now if batch.preempted else self._next_event(), (), self._take_events())
        seconds = self._timing.seconds(batch.shape())
        self.counts.steps += 1
        self.counts.computed_tokens += self.settings.max_num_batched_tokens - batch.budget
        outputs = self._emit(batch.emitting, now + seconds)
        self.counts.generated_tokens += len(batch.emitting)
        return StepResult(now + seconds, outputs, self._take_events(), seconds)

    def _next_event(self) -> float | None:
        times = [sequence.arrives_at for sequence in self._transferring] + [expires_at for _, expires_at in self._held.values()]
        return min(times, default=None)

    def _take_events(self) -> tuple[Event, ...]:
        events, self._events = tuple(self._events), []
        return events

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.settings.block_size)

    # --- scheduling -----------------------------------------------------------------------------------------------

    def _schedule_running(self, batch: _Batch) -> None:
        position, size = 0, self.settings.block_size
        while position < len(self._running) and batch.budget:
            sequence = self._running[position]
            computed = sequence.computed
            count = min(sequence.chain.length - computed, batch.budget)
            if computed + count > len(sequence.blocks) * size and not self._grow(sequence, count, batch):
                break
            if computed + 1 == sequence.chain.length and (computed + 1) % size:
                # What nearly every sequence does in nearly every step, short: decode within a block.
                sequence.computed = computed + 1
                batch.budget -= 1
                batch.decode_sequences += 1
                batch.context_tokens += computed
                batch.emitting.append(sequence)
            else:
                self._advance(sequence, count, batch)
            position += 1

    def _grow(self, sequence: Sequence, count: int, batch: _Batch) -> bool:
        """Blocks for `count` more tokens, by preempting the youngest if need be; False if that was this one itself."""
        wanted = self._blocks_of(sequence.computed + count) - len(sequence.blocks)
        while wanted > self._pool.free:
            victim = self._running.pop()
            self._preempt(victim)
            batch.preempted = True
            if victim is sequence:
                return False
        self._allocate(sequence, wanted)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._pool.release(victim.blocks)
        victim.blocks = []
        victim.computed = victim.cached_blocks = 0
        self._waiting.appendleft(victim)
        self.counts.preemptions += 1

    def _schedule_waiting(self, batch: _Batch, now: float) -> None:
        while self._arrived and batch.budget:
            self._start(self._arrived.popleft(), batch)
        while self._waiting and batch.budget and len(self._running) + len(self._transferring) < self.settings.max_num_seqs:
            sequence = self._waiting[0]
            pulls = sequence.request.remote_tokens > 0 and sequence.cached_tokens < 0
            if not self._admit(sequence, batch, whole=pulls):
                break
            self._waiting.popleft()
            if pulls:
                self._begin_transfer(sequence, now)
            else:
                self._start(sequence, batch)

    def _start(self, sequence: Sequence, batch: _Batch) -> None:
        self._running.append(sequence)
        self._advance(sequence, min(sequence.chain.length - sequence.computed, batch.budget), batch)

    def _admit(self, sequence: Sequence, batch: _Batch, *, whole: bool) -> bool:
        """Takes the cached prefix and blocks for the first chunk (or the whole prompt), if the whole prompt would fit."""
        length, size = sequence.chain.length, self.settings.block_size
        matched = self._pool.match(sequence.chain.block_hashes[: (length - 1) // size])
        watermark = self._watermark_blocks if self._running else 0
        if self._blocks_of(length) - len(matched) + self._pool.evictable_among(matched) + watermark > self._pool.free:
            return False
        self._pool.touch(matched)
        sequence.blocks = matched
        sequence.cached_blocks = len(matched)
        sequence.computed = len(matched) * size
        if not whole:
            self._note_cached(sequence)
        end = length if whole else min(length, sequence.computed + batch.budget)
        self._allocate(sequence, self._blocks_of(end) - len(matched))
        return True

    def _note_cached(self, sequence: Sequence) -> None:
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.computed
            self.counts.prompt_tokens += len(sequence.request.prompt)
            self.counts.cached_tokens += sequence.computed

    def _allocate(self, sequence: Sequence, count: int) -> None:
        blocks, evicted = self._pool.allocate(count)
        sequence.blocks += blocks
        if evicted:
            self._events.append(BlockRemoved(hashes=np.array(evicted, dtype=np.uint64), group=0))

    def _advance(self, sequence: Sequence, count: int, batch: _Batch) -> None:
        """Computes the next `count` tokens of a sequence that has blocks for them."""
        start = sequence.computed
        batch.budget -= count
        if count == 1:
            batch.decode_sequences += 1
            batch.context_tokens += start
        else:
            batch.prefill_tokens += count
            batch.attention_pairs += count * (start + 0.5 * count)
        sequence.computed = start + count
        if sequence.computed // self.settings.block_size > sequence.cached_blocks:
            self._cache_full(sequence)
        if sequence.computed == sequence.chain.length:
            batch.emitting.append(sequence)

    def _cache_full(self, sequence: Sequence) -> None:
        first, last, size = sequence.cached_blocks, sequence.computed // self.settings.block_size, self.settings.block_size
        hashes = sequence.chain.block_hashes[first:last]
        self._pool.cache(sequence.blocks[first:last], hashes)
        sequence.cached_blocks = last
        parent = sequence.chain.block_hashes[first - 1] if first else None
        tokens = sequence.chain.tokens(first * size, last * size).view(np.uint32)
        self._events.append(BlockStored(hashes=np.array(hashes, dtype=np.uint64), parent=parent, tokens=tokens, block_size=size))

    def _emit(self, sequences: list[Sequence], at: float) -> tuple[EngineOutput, ...]:
        """Every sequence gets its next token; those that are complete leave."""
        outputs: list[EngineOutput] = []
        ended = False
        for sequence in sequences:
            token, index = sequence.chain.generate(), sequence.generated
            sequence.generated = index + 1
            finished = sequence.generated >= sequence.limit
            if finished:
                ended = True
                self._end(sequence, at)
            if finished or index == 0 or not self._milestones_only:
                outputs.append(EngineOutput(sequence.request.request_id, token, index, sequence.cached_tokens, finished))
        if ended:
            self._running = [sequence for sequence in self._running if sequence.generated < sequence.limit]
        return tuple(outputs)

    def _end(self, sequence: Sequence, at: float) -> None:
        if self.settings.role is Role.PREFILL:
            self._held[sequence.request.request_id] = (sequence, at + self.settings.handoff_lease_s)
        else:
            self._pool.release(sequence.blocks)

    # --- transfers ------------------------------------------------------------------------------------------------

    def _begin_transfer(self, sequence: Sequence, now: float) -> None:
        """Pulls what the local cache lacks; the blocks are taken at once and become findable on arrival."""
        missing = max(0, min(sequence.request.remote_tokens, sequence.chain.length) - sequence.computed)
        seconds = missing * self.settings.kv_bytes_per_token / self.settings.transfer_bytes_per_s / self._timing.speedup
        self._link_free_at = max(now, self._link_free_at) + seconds
        sequence.arrives_at = self._link_free_at + self.settings.transfer_latency_s / self._timing.speedup
        self._note_cached(sequence)
        self.counts.transferred_tokens += missing
        self._transferring.append(sequence)

    def _take_arrivals(self, now: float) -> None:
        arrived = [sequence for sequence in self._transferring if sequence.arrives_at <= now]
        if not arrived:
            return
        self._transferring = [sequence for sequence in self._transferring if sequence.arrives_at > now]
        for sequence in arrived:
            # The last prompt position is computed here, for its logits, also when all KV came.
            sequence.computed = max(sequence.computed, min(sequence.request.remote_tokens, sequence.chain.length - 1))
            if sequence.computed // self.settings.block_size > sequence.cached_blocks:
                self._cache_full(sequence)
            self._arrived.append(sequence)

    def _expire_handoffs(self, now: float) -> None:
        for request_id in [request_id for request_id, (_, expires_at) in self._held.items() if expires_at <= now]:
            self.release_handoff(request_id)
            self.counts.expired_handoffs += 1

    def check_integrity(self) -> None:
        """Raises EngineError if blocks and requests contradict one another."""
        self._pool.check_integrity()
        owners = [*self._running, *self._transferring, *self._arrived, *self._waiting, *(sequence for sequence, _ in self._held.values())]
        if self.used_blocks != len({block for sequence in owners for block in sequence.blocks}):
            raise EngineError("used blocks and the blocks of requests differ: a request leaks blocks or shares its own")
        for sequence in owners:
            if sequence.computed > len(sequence.blocks) * self.settings.block_size or sequence.cached_blocks > len(sequence.blocks):
                raise EngineError(f"request {sequence.request.request_id} has computed more tokens than its blocks hold")
