# SPDX-License-Identifier: Apache-2.0
"""Plays one scenario on a running fleet: load, the fault, until all is as before and has been for a while."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from fault_tolerance.clients import Clients, Front, front_of
from fault_tolerance.fleets import Fleet
from fault_tolerance.outcomes import Row, Sample, Window, assess
from fault_tolerance.parts import START_S, Part, go_on, stop
from fault_tolerance.scenarios import Fault, How, Load, Scenario, Which
from servers import wait_for

_BEFORE_S, _AFTER_S = 180.0, 180.0
_AFTER_SHARE = 0.25
"""Of the requests, so many begin after all is over."""
_COMPARED = 6
_STEP_S = 0.02


async def play(scenario: Scenario, fleet: Fleet, first_number: int) -> Row:
    """Its row; asserts only that the fleet comes back within the scenario's bound."""
    front = front_of(fleet)
    clients = Clients(front, scenario.load, first_number)
    running = asyncio.create_task(clients.run())
    try:
        await _until(lambda: len(clients.samples) >= scenario.fault.after_requests, _BEFORE_S, "requests before the fault")
        await _until(lambda: len(clients.streaming) >= scenario.load.clients / 4, _BEFORE_S, "streams for the fault to hit")
        struck = time.monotonic()
        refused = await _strike(scenario, fleet, front)
        await asyncio.to_thread(wait_for, fleet.whole, scenario.expect.whole_s, f"the fleet to be whole again after {scenario.name!r}")
        window = Window(struck, struck if scenario.fault.how is How.NOTHING else time.monotonic())
        await _until(lambda: _enough(clients.samples, scenario.load, window), _AFTER_S, "requests after the fault")
        clients.stopping = True
        async with asyncio.timeout(_AFTER_S):
            await running
        compared, differing = await _compare(clients, window)
        return replace(assess(scenario.name, clients.samples, window), compared=compared, differing=differing, refused=refused)
    finally:
        clients.stopping = True
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await front.close()


async def _until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """`wait_for` on the event loop's own figures."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(_STEP_S)


def _enough(samples: list[Sample], load: Load, window: Window) -> bool:
    after = sum(one.began >= window.whole for one in samples)
    return len(samples) >= load.requests and after >= load.requests * _AFTER_SHARE


async def _compare(clients: Clients, window: Window) -> tuple[int, int]:
    """Asks again for answers that were in flight when it happened: as many, and how many of them were other tokens."""
    struck = [one for one in clients.samples if one.began < window.struck < one.ended and not one.error][:_COMPARED]
    again = [await clients.request(one.number) for one in struck]
    return len(struck), sum(one.ids != other.ids for one, other in zip(struck, again, strict=True))


async def _strike(scenario: Scenario, fleet: Fleet, front: Front) -> int:
    """Does what the fault says; returns when it is over, with the prompts that were refused."""
    if scenario.fault.how is How.FLOOD:
        return await _flood(scenario, fleet, front)
    await asyncio.to_thread(_STRIKES[scenario.fault.how], fleet, scenario.fault)
    return 0


async def _flood(scenario: Scenario, fleet: Fleet, front: Front) -> int:
    """Prompts of twice the context, each of which must be refused with a sentence that names it; the others go on meanwhile."""
    refused, until = 0, time.monotonic() + scenario.fault.lasts_s
    load = replace(scenario.load, isl=2 * fleet.context, retries=0)
    intruder = Clients(front, load, 0)
    while time.monotonic() < until:
        sample = await intruder.request(refused)
        assert str(fleet.context) in sample.error, f"a prompt of {load.isl} tokens got: {sample}"
        refused += 1
    assert refused, "no prompt was sent within the time of the flood"
    return refused


@dataclass(frozen=True)
class _Pause:
    """A time to let pass."""

    seconds: float

    def run(self) -> None:
        end = time.monotonic() + self.seconds
        wait_for(lambda: time.monotonic() >= end, self.seconds + 10, "the end of a pause")


def _nothing(fleet: Fleet, fault: Fault) -> None:
    """For comparison."""


def _kill(fleet: Fleet, fault: Fault) -> None:
    part = fleet.parts[fault.victim]
    part.find(fault.which).kill()
    if fault.which is Which.CONSOLIDATOR:
        return  # the worker's own supervisor starts another one
    part.bury()
    if fault.returns:
        _Pause(fault.lasts_s).run()
        _start_again(fleet, part)
    else:
        fleet.forget(part)


def _start_again(fleet: Fleet, part: Part) -> None:
    fleet.mourn(part)
    part.start()


def _stop(fleet: Fleet, fault: Fault) -> None:
    victim = fleet.parts[fault.victim].find(fault.which)
    stop(victim)
    try:
        _Pause(fault.lasts_s).run()
    finally:
        go_on(victim)


def _terminate(fleet: Fleet, fault: Fault) -> None:
    part = fleet.parts[fault.victim]
    part.terminate()
    _start_again(fleet, part)


def _cut(fleet: Fleet, fault: Fault) -> None:
    fleet.cut(fault.victim)
    try:
        _Pause(fault.lasts_s).run()
    finally:
        fleet.mend(fault.victim)


def _roll(fleet: Fleet, fault: Fault) -> None:
    """One replica after the other: the next one only when the fleet is whole."""
    for part in fleet.replicas(fault.victim):
        fleet.out.add(part.name)
        part.drain()
        part.terminate()
        _start_again(fleet, part)
        wait_for(fleet.whole, START_S, f"the fleet to be whole with a new {part.name}")
        fleet.out.discard(part.name)


_STRIKES: dict[How, Callable[[Fleet, Fault], None]] = {
    How.NOTHING: _nothing, How.KILL: _kill, How.STOP: _stop, How.TERM: _terminate, How.CUT: _cut, How.ROLL: _roll,
}
