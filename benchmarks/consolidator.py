# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.consolidator`: block events per second through the KV-event consolidator, and what it adds to their way.

A consolidator runs as its users run it, in a process of its own on one core. This process is the engine and the router: it publishes
batches in vLLM's format over ZMQ and takes what comes out. First as fast as a window of frames allows (block events per second), then
at fixed rates (latency: from when a frame was due to when the last that it led to has arrived, both sockets and the interpreter of
this process included). At the end both sides of the stream are read: the blocks held in each tier, their parents and their tokens
must be the same, nothing lost, nothing doubled, no block before its parent. A block event is one block stored or removed.
"""

import argparse
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import hardware
from benchmarks.consolidator_rig import Ports, Rig, rig
from benchmarks.consolidator_trace import Frame, State, device_frames, tier_frames
from benchmarks.errors import BenchmarkError
from benchmarks.measures import percentile

TRACES = {"tiers": tier_frames, "device": device_frames}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if what came out was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.consolidator", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; without, the object is indented")
    parser.add_argument("--events", type=int, default=600_000, help="block events of the throughput measurement, per trace")
    parser.add_argument("--warm-events", type=int, default=400_000,
                        help="block events before that; enough to fill every tier, so that whatever is stored then pushes something out")
    parser.add_argument("--window", type=int, default=32, help="frames in flight while throughput is measured")
    parser.add_argument("--rates", type=lambda text: [int(part) for part in text.split(",")], default=[20_000, 100_000],
                        help="block events per second at which latency is measured; the last one is the headline's")
    parser.add_argument("--seconds", type=float, default=6.0, help="at each rate")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    machine = hardware.detect().describe()
    report: dict[str, Any] = {"hardware": machine, "command": "python -m benchmarks.consolidator " + " ".join(argv or sys.argv[1:]),
                              "placement": _placement(cores), "load_average_before": os.getloadavg()[0]}
    try:
        report["traces"] = {name: _measure(name, args, cores) for name in TRACES}
    except BenchmarkError as exc:
        _say(f"FAILED: {exc}")
        return 1
    report |= _headline(report["traces"]["tiers"]) | {"load_average_after": os.getloadavg()[0]}
    print(json.dumps(report) if args.json else json.dumps(report, indent=1), flush=True)
    return 0


def _headline(tiers: dict[str, Any]) -> dict[str, float]:
    rate, latency = list(tiers["latency"].items())[-1]
    return {"block_events_per_s": tiers["block_events_per_s"], "block_events_per_cpu_s": tiers["block_events_per_cpu_s"],
            "latency_p50_ms": latency["p50_ms"], "latency_p99_ms": latency["p99_ms"], "latency_load_block_events_per_s": float(rate)}


def _measure(name: str, args: argparse.Namespace, cores: Sequence[int]) -> dict[str, Any]:
    """One trace, from an empty consolidator to the comparison."""
    frames = TRACES[name](1 << 30, args.seed)
    _say(f"{name}: making the load")
    warm = _take(frames, args.warm_events)
    loads = [_take(frames, args.events), *(_take(frames, int(rate * args.seconds)) for rate in args.rates)]
    with rig(_ports(), cores) as running:
        gc.collect()
        gc.disable()
        try:
            _push(running, warm, args.window)
            _say(f"{name}: as fast as it goes")
            figures = _throughput(running, loads[0], args.window)
            figures["latency"] = {rate: _latency(running, load, rate) for rate, load in zip(args.rates, loads[1:], strict=True)}
        finally:
            gc.enable()
        _say(f"{name}: comparing")
        return {**figures, "frames": len(running.sent), "frames_out": len(running.received), "blocks_held": _compare(running)}


def _take(frames: Iterator[Frame], events: int) -> list[Frame]:
    """The next frames, with at least so many block events."""
    taken: list[Frame] = []
    while events > 0:
        taken.append(next(frames))
        events -= taken[-1].blocks
    return taken


def _push(running: Rig, frames: Sequence[Frame], window: int) -> None:
    for frame in frames:
        while running.open >= window:
            running.take(1.0)
        running.send(frame)
    running.settle()


def _throughput(running: Rig, frames: Sequence[Frame], window: int) -> dict[str, Any]:
    blocks, cpu_s, waited_s = sum(frame.blocks for frame in frames), running.cpu_s(), running.waited_s()
    begin = time.perf_counter()
    _push(running, frames, window)
    wall_s, cpu_s = time.perf_counter() - begin, running.cpu_s() - cpu_s
    return {"block_events_per_s": blocks / wall_s, "block_events_per_cpu_s": blocks / cpu_s, "block_events": blocks, "wall_s": wall_s,
            "waited_for_its_core_s": running.waited_s() - waited_s}


def _latency(running: Rig, frames: Sequence[Frame], rate: int) -> dict[str, float]:
    """Frames fall due at the rate of their blocks, whether or not earlier ones have come out."""
    due_s, first, cpu_s, waited_s = time.perf_counter(), len(running.sent), running.cpu_s(), running.waited_s()
    dues: list[float] = []
    for frame in frames:
        while (ahead_s := due_s - time.perf_counter()) > 0:
            running.take(ahead_s)
        running.send(frame)
        running.take(0)
        dues.append(due_s)
        due_s += frame.blocks / rate
    running.settle()
    took_ms = [1000 * (running.arrived_s[first + place] - due) for place, due in enumerate(dues)]
    share = (running.cpu_s() - cpu_s) / (time.perf_counter() - dues[0])
    return {"p50_ms": percentile(took_ms, 50), "p99_ms": percentile(took_ms, 99), "max_ms": max(took_ms), "frames": len(took_ms),
            "consolidator_core_share": share, "waited_for_its_core_s": running.waited_s() - waited_s}


def _compare(running: Rig) -> dict[str, int]:
    """Blocks held in each tier. Raises BenchmarkError if the two sides differ."""
    before, after = State(), State()
    for frame in running.sent:
        before.read(bytes(frame.payload))
    for payload in running.received:
        after.read(payload)
    for tier, held in before.held.items():
        if held != after.held[tier]:
            raise BenchmarkError(f"{tier.name}: {len(held.items() ^ after.held[tier].items())} blocks differ between what went in and out")
    return {tier.name: len(held) for tier, held in after.held.items()}


def _ports() -> Ports:
    """Free ones, from the kernel; the one 1000 above the stream's is free as well."""
    while True:
        with socket.socket() as one, socket.socket() as two, socket.socket() as three, socket.socket() as four, socket.socket() as above:
            for probe in (one, two, three, four):
                probe.bind(("127.0.0.1", 0))
            stream = int(three.getsockname()[1])
            if stream + 1000 < 65536 and above.connect_ex(("127.0.0.1", stream + 1000)) != 0:
                return Ports(one.getsockname()[1], two.getsockname()[1], stream, four.getsockname()[1])


def _placement(cores: Sequence[int]) -> str:
    if len(cores) == 1:
        return "consolidator, engine and router share one core"
    return f"consolidator on core {cores[-1]}, engine and router on {len(cores) - 1} other(s)"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
