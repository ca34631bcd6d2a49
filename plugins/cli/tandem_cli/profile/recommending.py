# SPDX-License-Identifier: Apache-2.0
"""What the profiles of several choices recommend, in the planner's files, as text and as JSON.

The planner's model needs SciPy; where that is missing, choices are measured all the same, each in its own folder.
"""

import argparse
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem_cli.profile.advising import advised_isl
from tandem_cli.profile.server import say
from tandem_planner.profile_data import Profile, write_profile
from tandem_planner.profiler.plots import write_plots
from tandem_protocol.durable import replace_file

if TYPE_CHECKING:
    from tandem_planner.profiler.choices import Candidate, Recommendation

RECOMMENDATION = "recommendation.json"


def parallel_sizes(asked: tuple[int, ...], gpus: int) -> tuple[int, ...]:
    """The tensor-parallel sizes to try: those that were asked for, else powers of two as far as the GPUs go; on a CPU 1."""
    return tuple(sorted(set(asked))) or tuple(size for size in (1, 2, 4, 8, 16) if size <= max(1, gpus))


def recommendation_for(args: argparse.Namespace, profiles: Mapping[int, Profile]) -> "Recommendation | None":
    """None, with a line that says why, where none can be given."""
    whole = {size: profile for size, profile in profiles.items() if profile.prefill is not None and profile.decode is not None}
    if not whole:
        say("no recommendation: no choice was measured for prefill and for decode")
        return None
    try:
        choices, sla_plan = (importlib.import_module(f"tandem_planner.{name}") for name in ("profiler.choices", "sla_plan"))
    except ImportError as exc:
        say(f"no recommendation, since a package is missing here ({exc}): run the same command where it is not, nothing is measured again")
        return None
    isl = advised_isl(args, whole[min(whole)])
    found: Recommendation = choices.recommend(whole, sla_plan.Targets(args.ttft / 1e3, args.itl / 1e3), isl, args.osl)
    return found


def write_best(out: Path, profiles: Mapping[int, Profile], found: "Recommendation | None") -> None:
    """The best choice's figures per phase as one profile, which the planner takes with the engines' GPUs set; and the recommendation."""
    if found is not None:
        best = Profile(profiles[found.prefill.tp].prefill, profiles[found.decode.tp].decode)
        replace_file(out / RECOMMENDATION, (json.dumps(recommendation_json(found), indent=1) + "\n").encode())
    elif len(profiles) == 1:
        best = next(iter(profiles.values()))
    else:
        return
    write_profile(best, out)
    write_plots(best, out / "plots", say)


def recommendation_lines(out: Path, found: "Recommendation | None") -> list[str]:
    """For people: every candidate, the sentence, and what to start."""
    if found is None:
        return []
    rows = [f"  {one.role.value:<11}TP {one.tp:<3}{one.requests_per_gpu_s:8.3g} requests/s and GPU, {one.latency_s * 1e3:.4g} ms unloaded"
            f"{'' if one.met else ' (beyond the target)'}" for one in found.candidates]
    return [*rows, found.reason, *_commands(out, found)]


def _commands(out: Path, found: "Recommendation") -> list[str]:
    if not found.disaggregate:
        tp = found.aggregated.tp
        return [f"  tandem serve --mode agg --tensor-parallel-size {tp}",
                f"  python -m tandem_planner --mode agg --profile-results-dir {out / f'tp{tp}'} --decode-engine-num-gpu {tp}"]
    prefill, decode = found.prefill.tp, found.decode.tp
    engines = f"--prefill-engine-num-gpu {prefill} --decode-engine-num-gpu {decode}"
    return [f"  prefill:decode = {found.ratio}", f"  tandem serve --is-prefill-worker --tensor-parallel-size {prefill}",
            f"  tandem serve --is-decode-worker --tensor-parallel-size {decode}",
            f"  python -m tandem_planner --mode disagg --profile-results-dir {out} {engines}"]


def recommendation_json(found: "Recommendation | None") -> dict[str, Any] | None:
    """As `--json` prints it, and as the file holds it."""
    if found is None:
        return None
    candidates = [_candidate_json(one) for one in found.candidates]
    return {"disaggregate": found.disaggregate, "ratio": found.ratio, "reason": found.reason, "prefill_tp": found.prefill.tp,
            "decode_tp": found.decode.tp, "aggregated_tp": found.aggregated.tp, "candidates": candidates}


def _candidate_json(one: "Candidate") -> dict[str, Any]:
    return {"role": one.role.value, "tp": one.tp, "requests_per_gpu_s": one.requests_per_gpu_s, "latency_s": one.latency_s, "met": one.met}
