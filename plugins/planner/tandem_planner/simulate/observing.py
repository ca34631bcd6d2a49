# SPDX-License-Identifier: Apache-2.0
"""What a planner would see of a simulated fleet: traffic over a window as the router's histograms tell it, pools as they are."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from tandem_planner.simulate.fleet import Fleet, Milestone
from tandem_planner.simulate.requests import SimRequest
from tandem_planner.terms import Latency, Observation, Traffic


def observe(fleet: Fleet, window_s: float | None) -> Observation:
    """The fleet now, with the traffic of the last `window_s` seconds unless that is None."""
    if window_s is None:
        return Observation(fleet.now, fleet.pools())
    since = max(0.0, fleet.now - window_s)
    arrived = len(fleet.arrived_s) - bisect_right(fleet.arrived_s, since)
    traffic = _traffic(arrived, _since(fleet.firsts, since), _since(fleet.ends, since), fleet.now - since)
    missing = () if traffic is not None else ("no request had its first token, or none ended, in the window",)
    return Observation(fleet.now, fleet.pools(), traffic, missing)


def _traffic(arrived: int, firsts: list[SimRequest], ends: list[SimRequest], window_s: float) -> Traffic | None:
    """As the router counts: prompts at their first token, answers at their end. None if a figure would rest on nothing."""
    if not arrived or not firsts or not ends or window_s <= 0:
        return None
    inputs = sum(request.input_tokens for request in firsts)
    return Traffic(
        interval_s=window_s, requests=arrived, isl=inputs / len(firsts), osl=float(np.mean([request.output_tokens for request in ends])),
        ttft=latency([request.ttft_s for request in firsts]), itl=latency([request.itl_s for request in ends]),
        request_s=float(np.mean([request.end_s - request.at_s for request in ends])),
        cached_fraction=sum(request.cached_tokens for request in firsts) / inputs,
    )


def latency(seconds: Sequence[float]) -> Latency:
    """Mean and percentiles of at least one figure."""
    p50, p95, p99 = np.percentile(seconds, (50, 95, 99))
    return Latency(float(np.mean(seconds)), float(p50), float(p95), float(p99))


def _since(milestones: list[Milestone], since_s: float) -> list[SimRequest]:
    begin = bisect_left(milestones, since_s, key=_moment)
    return [milestone.request for milestone in milestones[begin:] if not milestone.request.refused]


def _moment(milestone: Milestone) -> float:
    return milestone.at_s
