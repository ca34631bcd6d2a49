# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.router_index`: Tandem's KV index against RadixTree of ai-dynamo-runtime: same events, same queries, one run.

Store rates take what each side's Python API takes: ours the decoded vLLM event with its token ids, which it hashes; RadixTree
its JSON event, whose hashes are given to it. Neither is charged for building its input, nor ours for taking the memory that a
worker's record announces (`add_worker(blocks=...)`, as the fleet does when a worker joins; RadixTree can't be told). The events
of all workers come mixed. Every answer is compared before anything is timed. Rates of storing and hashing are the best of several
repetitions, those of lookups come from the median; percentiles are over single calls. Beside the wall clock stands the CPU time of
the process, both threads of RadixTree included: on a busy machine the wall clock has the neighbours in it. The headline ratios are by
the wall clock, `*_cpu` by CPU time.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dynamo.llm import RadixTree, compute_block_hash_for_seq

from benchmarks import hardware
from benchmarks.errors import BenchmarkError
from benchmarks.index_workload import BLOCK_SIZE, EVENT_BLOCKS, PROMPT_BLOCKS, Prompt, Workload, make_prompts, make_workload
from tandem_protocol.blocks import hash_blocks
from tandem_protocol.kv_events import BlockStored, decode, encode
from tandem_router.index import KvIndex, warm_up

LENGTHS = (128, 1000, 8000)
WORKERS = (8, 64)


@dataclass(frozen=True)
class Lookups:
    """One prompt length at one number of workers, one side."""

    lookups_per_s: float
    blocks_per_s: float
    p50_us: float
    p99_us: float
    p50_cpu_us: float
    p99_cpu_us: float


@dataclass(frozen=True)
class Rate:
    """Of storing, hashing or decoding."""

    blocks_per_s: float
    blocks_per_cpu_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_index", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; without, the object is indented")
    parser.add_argument("--prompts", type=int, default=64, help=f"of {PROMPT_BLOCKS} blocks each")
    parser.add_argument("--event-blocks", type=int, default=EVENT_BLOCKS, help="blocks per event; 1: as when all blocks come from decoding")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each rate; the best counts")
    parser.add_argument("--seconds", type=float, default=1.0, help="of lookups per case and side")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    machine = hardware.detect().describe()
    _say(machine)
    warm_up()
    prompts = make_prompts(args.prompts, args.seed)
    report: dict[str, Any] = {"hardware": machine, "command": "python -m benchmarks.router_index " + " ".join(argv or sys.argv[1:]),
                              "baseline": "ai-dynamo-runtime " + importlib.metadata.version("ai-dynamo-runtime"),
                              "load_average_before": os.getloadavg()[0], "hashing": _measure_hashing(prompts[0], args.repeat)}
    loads = (make_workload(prompts, workers, args.event_blocks) for workers in WORKERS)
    report["workers"] = {load.workers: _measure(load, args.repeat, args.seconds) for load in loads}
    report["frame_to_index_one_block_events"] = _measure_single_blocks(prompts[0], args.repeat)
    report |= _headline(report) | {"load_average_after": os.getloadavg()[0]}
    print(json.dumps(report) if args.json else json.dumps(report, indent=1), flush=True)
    return 0


def _headline(report: dict[str, Any]) -> dict[str, float]:
    cases = [(side["tandem"]["lookups"][length], side["radix_tree"]["lookups"][length])
             for side in report["workers"].values() for length in LENGTHS]
    stores = [(side["tandem"]["store"], side["radix_tree"]["store"]) for side in report["workers"].values()]
    most = report["workers"][max(WORKERS)]
    return {
        "ratio_store": min(ours["blocks_per_s"] / theirs["blocks_per_s"] for ours, theirs in stores),
        "ratio_store_cpu": min(ours["blocks_per_cpu_s"] / theirs["blocks_per_cpu_s"] for ours, theirs in stores),
        "ratio_lookup": min(ours["lookups_per_s"] / theirs["lookups_per_s"] for ours, theirs in cases),
        "ratio_lookup_cpu": min(theirs["p50_cpu_us"] / ours["p50_cpu_us"] for ours, theirs in cases),
        "ratio_hash_list": report["hashing"]["tandem_list"]["blocks_per_s"] / report["hashing"]["radix_tree_list"]["blocks_per_s"],
        "ratio_hash": report["hashing"]["tandem_array"]["blocks_per_s"] / report["hashing"]["radix_tree_list"]["blocks_per_s"],
        "block_ops_per_s": _mixed(most["tandem"]), "block_ops_per_s_radix_tree": _mixed(most["radix_tree"]),
        "lookup_1000_p99_us": most["tandem"]["lookups"][1000]["p99_us"],
        "lookup_1000_p50_us": most["tandem"]["lookups"][1000]["p50_us"],
        "frame_to_index_blocks_per_s": most["tandem"]["frame_to_index"]["blocks_per_s"],
        "frame_to_index_blocks_per_cpu_s": most["tandem"]["frame_to_index"]["blocks_per_cpu_s"],
        "bytes_per_stored_block": most["tandem"]["bytes_per_stored_block"],
    }


def _mixed(side: dict[str, Any]) -> float:
    """Blocks per second when as many blocks are stored as are looked up, in 1,000-block prompts."""
    return 2 / (1 / side["store"]["blocks_per_s"] + 1 / side["lookups"][1000]["blocks_per_s"])


def _measure(load: Workload, repeat: int, seconds: float) -> dict[str, Any]:
    _say(f"{load.workers} workers: storing {load.stored_blocks} blocks")
    blocks = load.stored_blocks
    before = _resident_bytes()
    tree = RadixTree()
    _fill_tree(tree, load)
    tree_bytes = _resident_bytes() - before
    index = _new_index(load)
    _fill_index(index, load)
    _compare(index, tree, load)
    tandem: dict[str, Any] = {
        "store": _rate(blocks, lambda: _new_index(load), lambda fresh: _fill_index(fresh, load), repeat),
        "frame_to_index": _rate(blocks, lambda: _new_index(load), lambda fresh: _fill_from_frames(fresh, load), repeat),
        "bytes_per_stored_block": index.stats().size_bytes / index.stats().holdings,
    }
    radix: dict[str, Any] = {
        "store": _rate(blocks, RadixTree, lambda fresh: _fill_tree(fresh, load), repeat),
        "bytes_per_stored_block": tree_bytes / blocks,
    }
    _say(f"  tandem {tandem}\n  radix_tree {radix}")
    tandem["lookups"], radix["lookups"] = {}, {}
    for length in LENGTHS:
        tandem["lookups"][length] = _measure_lookups(index.match, [prompt.keys[:length] for prompt in load.prompts], length, seconds)
        radix["lookups"][length] = _measure_lookups(tree.find_matches, [prompt.local[:length] for prompt in load.prompts], length, seconds)
        _say(f"  {length} blocks: tandem {tandem['lookups'][length]}\n  {length} blocks: radix_tree {radix['lookups'][length]}")
    index.check_integrity()
    return {"tandem": tandem, "radix_tree": radix}


def _new_index(load: Workload) -> KvIndex:
    index = KvIndex()
    for worker in range(load.workers):
        index.add_worker(str(worker), 0, BLOCK_SIZE, load.most_blocks)
    return index


def _fill_index(index: KvIndex, load: Workload) -> None:
    for worker, event in load.events:
        index.apply(worker, event)


def _fill_from_frames(index: KvIndex, load: Workload) -> None:
    for worker, frame in load.frames:
        for event in decode(frame).events:
            index.apply(worker, event)


def _fill_tree(tree: RadixTree, load: Workload) -> None:
    for worker, event in load.radix:
        tree.apply_event(worker, event)
    tree.find_matches(load.prompts[0].local[:1])  # its thread answers in order: all events are in


def _compare(index: KvIndex, tree: RadixTree, load: Workload) -> None:
    for prompt in load.prompts:
        for length in LENGTHS:
            total = index.match(prompt.keys[:length]).total
            ours = {(int(slot), 0): int(total[slot]) for slot in np.flatnonzero(total)}
            theirs = dict(tree.find_matches(prompt.local[:length]).scores)
            if ours != theirs:
                raise BenchmarkError(f"the two sides disagree on a prompt of {length} blocks: {ours} and {theirs}")


def _measure_lookups(find: Callable[[Any], Any], queries: list[Any], length: int, seconds: float) -> dict[str, float]:
    order = np.random.default_rng(0).integers(0, len(queries), 1 << 16).tolist()
    wall, cpu = [], []
    gc.disable()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        query = queries[order[len(wall) % len(order)]]
        begin_cpu = time.process_time_ns()  # a system call of half a microsecond: outside the wall clock's span
        begin = time.perf_counter_ns()
        find(query)
        end_of_call = time.perf_counter_ns()
        cpu.append(time.process_time_ns() - begin_cpu)
        wall.append(end_of_call - begin)
    gc.enable()
    rate = 1e9 / float(np.median(wall))
    p50, p99 = np.percentile(wall, [50, 99]) / 1e3
    return asdict(Lookups(rate, rate * length, p50, p99, *(np.percentile(cpu, [50, 99]) / 1e3)))


def _measure_hashing(prompt: Prompt, repeat: int) -> dict[str, dict[str, float]]:
    listed = prompt.tokens.tolist()
    times = 5 * repeat
    return {
        "tandem_array": _rate(PROMPT_BLOCKS, lambda: prompt.tokens, lambda tokens: hash_blocks(tokens, BLOCK_SIZE), times),
        "tandem_list": _rate(PROMPT_BLOCKS, lambda: listed, lambda tokens: hash_blocks(tokens, BLOCK_SIZE), times),
        "radix_tree_list": _rate(PROMPT_BLOCKS, lambda: listed, lambda tokens: compute_block_hash_for_seq(tokens, BLOCK_SIZE), times),
    }


def _measure_single_blocks(prompt: Prompt, repeat: int) -> dict[str, float]:
    """Decoding engines send an event per block: frames of 64 such events, decoded and applied; events per second."""
    events = [BlockStored(hashes=prompt.hashes[at : at + 1], parent=int(prompt.hashes[at - 1]) if at else None, block_size=BLOCK_SIZE,
                          tokens=prompt.tokens[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]) for at in range(PROMPT_BLOCKS)]
    frames = [encode(events[at : at + 64]) for at in range(0, PROMPT_BLOCKS, 64)]
    load = Workload(1, [prompt], [(0, event) for event in events], [(0, frame) for frame in frames], [])
    return _rate(PROMPT_BLOCKS, lambda: _new_index(load), lambda fresh: _fill_from_frames(fresh, load), repeat)


def _rate(blocks: int, make: Callable[[], Any], run: Callable[[Any], Any], repeat: int) -> dict[str, float]:
    """Best rates of `run` on what `make` makes."""
    wall, cpu = [], []
    for _ in range(repeat):
        fresh = make()
        gc.collect()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        run(fresh)
        cpu.append(time.process_time() - begin_cpu)
        wall.append(time.perf_counter() - begin)
    return asdict(Rate(blocks / min(wall), blocks / min(cpu)))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
