# SPDX-License-Identifier: Apache-2.0
"""The consolidator's one thread: it polls all sockets, tracks, publishes, answers, and keeps the state on disk.

`start`, `report` and `close` may be called from any thread. Dumps are made and the state is written in a second thread, from copies.
"""

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import zmq

from tandem_kvbm.consolidator import history
from tandem_kvbm.consolidator.content import Content
from tandem_kvbm.consolidator.history import Dump, History
from tandem_kvbm.consolidator.intake import Intake, make_link
from tandem_kvbm.consolidator.lane import Lane
from tandem_kvbm.consolidator.lane_terms import Place
from tandem_kvbm.consolidator.outlet import Outlet
from tandem_kvbm.consolidator.plan import ALL_RANKS, Plan, Publisher
from tandem_kvbm.consolidator.report import Report, report_on
from tandem_kvbm.consolidator.state_file import SavedLane, load_lane, read_state, save_lane, write_state
from tandem_kvbm.consolidator.tracker import Change, Tracker
from tandem_protocol.errors import ConfigError, TandemError
from tandem_protocol.event_sequence_terms import Position

_log = logging.getLogger(__name__)
_TICK_S = 0.05
"""How late a deadline may be noticed."""
_CLOSE_S = 10.0
_MOST_QUESTIONS = 64


class Pump:
    """Runs a plan. Resource handling: `close` ends the thread, writes the state and frees all sockets."""

    def __init__(self, plan: Plan, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        """Raises ConfigError for endpoints that can't be used, or a state file that isn't one."""
        self._plan = plan
        self._clock = clock
        self._wall = wall
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="tandem-consolidator-helper")
        self._history = History(plan.buffer_steps)
        self._lag_s = 0.0
        self._dump: Dump | None = None
        self._dumping: Future[Dump] | None = None
        self._saving: Future[None] | None = None
        self._saved_end = -1
        self._next_save_s = 0.0
        self.dumps = self.save_failures = self.unasked = 0
        self._questions: deque[tuple[bytes, int]] = deque()
        self._closing = False
        self._next_tick_s = 0.0
        lanes, positions = ({}, {}) if plan.state is None else self._load(plan.state)
        self._tracker = Tracker({publisher.name: publisher.rank for publisher in plan.publishers}, plan.lane, lanes)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._watched: tuple[int, ...] = ()
        self._thread = threading.Thread(target=self._run, name="tandem-consolidator", daemon=True)
        try:
            self._outlet = Outlet(self._context, plan.endpoint, plan.replay_endpoint)
            self._intakes = tuple(self._intake(publisher, positions.get(publisher.key)) for publisher in plan.publishers)
        except ConfigError:
            self._free()
            raise

    def start(self) -> None:
        """Publishes what an earlier process knew, and starts to follow."""
        for payload in history.frames(self._contents(), self._wall()):
            self._send(payload)
        self._thread.start()

    def report(self) -> Report:
        """All figures; those of a moving stream may be some frames apart."""
        return report_on(self._intakes, self._tracker, self._outlet, self)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def lag_s(self) -> float:
        """From the engine's publication to ours, of the last batch, by the wall clock."""
        return self._lag_s

    @property
    def published(self) -> int:
        """Frames so far."""
        return self._history.end

    def close(self) -> None:
        """Within some seconds; may be called twice."""
        if self._closing:
            return
        self._closing = True
        self._ring()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            _log.error("consolidator.stuck: its thread didn't end within %.0f s and is left behind", _CLOSE_S)
            return
        self._helper.shutdown(wait=True)
        self._write(self._positions(), [(rank, lane.content, list(lane.places)) for rank, lane in self._tracker.lanes.items()])
        self._free()

    def _load(self, path: Path) -> tuple[dict[int, Lane], dict[str, Position]]:
        """What an earlier process wrote; nothing if that is damaged or of other ranks: it is worth a warm start, not more."""
        try:
            saved = read_state(path)
            lanes = {} if saved is None else {rank: self._load_lane(lane) for rank, lane in saved.lanes.items()}
        except (TandemError, OSError) as exc:
            _log.warning("consolidator.no_state: %s", exc)
            return {}, {}
        ranks = {publisher.rank for publisher in self._plan.publishers} - {ALL_RANKS} or {0}
        return (lanes, saved.positions) if saved is not None and ranks == lanes.keys() else ({}, {})

    def _load_lane(self, saved: SavedLane) -> Lane:
        lane = Lane(self._plan.lane, load_lane(saved), saved.places, self._clock())
        for gone in {place.source for place in saved.places} - {publisher.name for publisher in self._plan.publishers}:
            lane.clear(gone, None)
        lane.check_integrity()
        return lane

    def _intake(self, publisher: Publisher, resume: Position | None) -> Intake:
        return Intake(publisher, make_link(self._context, publisher), self._tracker, self._publish, clock=self._clock, wall=self._wall,
                      limits=self._plan.sequence, resume=resume)

    def _publish(self, change: Change) -> None:
        self._send(change.payload())
        self._lag_s = self._wall() - change.timestamp_s

    def _send(self, payload: bytes) -> None:
        self._outlet.publish(self._history.add(payload), payload)

    def _contents(self) -> list[tuple[int, Content]]:
        return [(rank, lane.content) for rank, lane in self._tracker.lanes.items()]

    def _positions(self) -> dict[str, Position]:
        return {intake.publisher.key: position for intake in self._intakes if (position := intake.sequence.position) is not None}

    def _ring(self, _: object = None) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._bell, 1)

    def _free(self) -> None:
        self._context.destroy(0)
        os.close(self._bell)

    # Below: the thread.

    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn(self._poll())
            except Exception:
                _log.exception("consolidator.round_failed: it goes on")
                self._watched = ()

    def _poll(self) -> set[object]:
        versions = tuple(intake.link.version for intake in self._intakes)
        if versions != self._watched:
            self._watch(versions)
        wait_s = 0.0 if self._outlet.busy else min(_TICK_S, max(0.0, self._next_tick_s - self._clock()))
        ready: set[object] = {socket for socket, _ in self._poller.poll(math.ceil(wait_s * 1000))}  # rounded down it would spin
        if self._bell in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        return ready

    def _watch(self, versions: tuple[int, ...]) -> None:
        self._poller = zmq.Poller()
        self._poller.register(self._bell, zmq.POLLIN)
        self._poller.register(self._outlet.replay, zmq.POLLIN)
        for intake in self._intakes:
            for socket in intake.link.sockets():
                self._poller.register(socket, zmq.POLLIN)
        self._watched = versions

    def _turn(self, ready: set[object]) -> None:
        """One round: what arrived, who asks, what is due."""
        now = self._clock()
        for intake in self._intakes:
            if not ready.isdisjoint(intake.link.sockets()):
                intake.step(now)
        if self._outlet.replay in ready:
            self._questions.extend(self._outlet.requests())
        self._answer()
        self._outlet.go_on()
        if now >= self._next_tick_s:
            self._next_tick_s = now + _TICK_S
            self._tick(now)

    def _tick(self, now: float) -> None:
        for intake in self._intakes:
            intake.tick(now)
        self._tracker.expire(now)
        if self._plan.state is not None and now >= self._next_save_s and self._saved_end != self._history.end:
            self._save(now)

    def _answer(self) -> None:
        """Answers what can be answered; the rest waits for a dump."""
        if self._dumping is not None and self._dumping.done():
            made, self._dumping = self._dumping, None
            self._dump = made.result()
        while len(self._questions) > _MOST_QUESTIONS:
            self._questions.popleft()
            self.unasked += 1
        for _ in range(len(self._questions)):
            client, start = self._questions.popleft()
            if self._history.needs_dump(start, self._dump):
                self._questions.append((client, start))
            else:
                self._outlet.answer(client, self._history.answer(start, self._dump))
        if self._questions and self._dumping is None:
            self._begin_dump()

    def _begin_dump(self) -> None:
        contents = [(rank, content.copy()) for rank, content in self._contents()]
        self.dumps += 1
        self._dumping = self._helper.submit(history.make_dump, self._history.end, contents, self._wall())
        self._dumping.add_done_callback(self._ring)

    def _save(self, now: float) -> None:
        if self._saving is not None and not self._saving.done():
            return
        self._next_save_s = now + self._plan.save_s
        self._saved_end = self._history.end
        lanes = [(rank, lane.content.copy(), list(lane.places)) for rank, lane in self._tracker.lanes.items()]
        self._saving = self._helper.submit(self._write, self._positions(), lanes)

    def _write(self, positions: dict[str, Position], lanes: "list[tuple[int, Content, list[Place]]]") -> None:
        if self._plan.state is None:
            return
        try:
            write_state(self._plan.state, {rank: save_lane(content, places) for rank, content, places in lanes}, positions)
        except OSError as exc:
            self.save_failures += 1
            _log.warning("consolidator.not_saved path=%s error=%s: a restart replays from the engine alone", self._plan.state, exc)
