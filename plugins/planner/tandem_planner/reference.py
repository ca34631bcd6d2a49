# SPDX-License-Identifier: Apache-2.0
"""The formulas of Dynamo's SLA planner as they are written there: what ours is compared with, in tests and in the benchmark.

They know no queueing, no percentiles, no aggregated pools and no cool-down; corrections are unbounded. Latencies in milliseconds.
"""

import math
from dataclasses import dataclass

from tandem_planner.interpolation import DecodeSurface, PrefillCurve

NONE_FIT = (0, 0)
"""What the reference answers if not even the minima fit; ours refuses such a configuration at start."""


@dataclass(frozen=True)
class Engines:
    """GPUs of one engine of each role, and what bounds the pools."""

    prefill_gpus: int = 1
    decode_gpus: int = 1
    min_endpoint: int = 1
    max_gpu_budget: int = 8
    """-1: no bound."""


@dataclass(frozen=True)
class Interval:
    """The traffic of one interval, foreseen or seen."""

    requests: float
    isl: float
    osl: float
    interval_s: float


def prefill_correction(ttft_ms: float, curve: PrefillCurve, isl: float) -> float:
    """Observed over profiled TTFT; queueing counts as if the engine were slower."""
    return ttft_ms / (curve.ttft_s(isl) * 1e3)


def decode_correction(itl_ms: float, surface: DecodeSurface, seen: Interval, decode_workers: int, request_s: float) -> float:
    """Observed over profiled ITL, at the concurrency that Little's law gives for whole requests."""
    concurrency = seen.requests / decode_workers * request_s / seen.interval_s
    context = seen.isl + seen.osl / 2
    return itl_ms / (surface.itl_s(surface.kv_use(concurrency, context), context) * 1e3)


def prefill_replicas(next_: Interval, throughput_per_gpu: float, engines: Engines, correction: float = 1.0) -> int:
    """Prompt tokens per second over what an engine computes; a correction above 1 is ignored."""
    load = next_.requests * next_.isl / next_.interval_s * min(1.0, correction)
    return max(engines.min_endpoint, math.ceil(load / throughput_per_gpu / engines.prefill_gpus))


def decode_replicas(next_: Interval, throughput_per_gpu: float, engines: Engines) -> int:
    """Generated tokens per second over what an engine gives at the corrected ITL (see `decode_target_ms`)."""
    return max(engines.min_endpoint, math.ceil(next_.requests * next_.osl / next_.interval_s / throughput_per_gpu / engines.decode_gpus))


def decode_target_ms(itl_ms: float, correction: float) -> float:
    """The ITL to look up, so that the corrected one is the target."""
    return itl_ms if correction <= 0 else itl_ms / correction


def budgeted(prefill: int, decode: int, engines: Engines) -> tuple[int, int]:
    """Both counts within the budget: prefill in proportion, then decode whatever is left."""
    total = prefill * engines.prefill_gpus + decode * engines.decode_gpus
    budget, least = engines.max_gpu_budget, engines.min_endpoint
    if budget < 0 or total <= budget:
        return prefill, decode
    if least * (engines.prefill_gpus + engines.decode_gpus) > budget:
        return NONE_FIT
    room = (budget - least * engines.decode_gpus) // engines.prefill_gpus
    prefill = max(least, min(room, math.floor(prefill * budget / total)))
    return prefill, max(least, (budget - prefill * engines.prefill_gpus) // engines.decode_gpus)


def replicas(next_: Interval, curve: PrefillCurve, surface: DecodeSurface, engines: Engines, itl_ms: float,
             corrections: tuple[float, float] = (1.0, 1.0)) -> tuple[int, int]:
    """The whole decision: prefill and decode workers. Without corrections it is the reference with --no-correction."""
    prefill = prefill_replicas(next_, curve.throughput_per_gpu(next_.isl), engines, corrections[0])
    target_s = decode_target_ms(itl_ms, corrections[1]) / 1e3
    best = surface.best_throughput_per_gpu(target_s, next_.isl + next_.osl / 2)
    return budgeted(prefill, decode_replicas(next_, best.throughput_per_gpu, engines), engines)
