# SPDX-License-Identifier: Apache-2.0
"""What a profile advises, as text and as JSON.

The planner's model needs SciPy; where that is missing, a profile is measured all the same.
"""

import argparse
import importlib
from typing import TYPE_CHECKING

from tandem_cli.profile.server import say
from tandem_planner.profile_data import Profile

if TYPE_CHECKING:
    from tandem_planner.profiler.advice import Advice

_LONGEST_ADVISED = 3000.0
"""Prompt tokens, unless asked for others."""


def advice_for(args: argparse.Namespace, profile: Profile, gpus: int) -> "Advice | None":
    """None, with a line that says why, where none can be given."""
    if profile.prefill is None or profile.decode is None:
        return None
    try:
        advice, sla_plan = (importlib.import_module(f"tandem_planner.{name}") for name in ("profiler.advice", "sla_plan"))
    except ImportError as exc:
        say(f"no advice, since a package is missing here ({exc}): `tandem plan` gives it where it is not")
        return None
    targets = sla_plan.Targets(args.ttft / 1e3, args.itl / 1e3)
    found: Advice = advice.advise(profile, targets, advised_isl(args, profile), args.osl, gpus)
    return found


def advised_isl(args: argparse.Namespace, profile: Profile) -> float:
    """Prompt tokens of the requests that advice is for."""
    longest = float(profile.prefill.isl[-1]) if profile.prefill is not None else _LONGEST_ADVISED
    return float(args.isl or min(_LONGEST_ADVISED, longest))


def advice_lines(advice: "Advice") -> list[str]:
    """For people."""
    return [advice.reason, f"prefill:decode = {advice.ratio}", *(f"  {term.name} = {term.value:.4g}: {term.how}" for term in advice.terms)]


def advice_json(advice: "Advice | None") -> dict[str, object] | None:
    """As `--json` prints it."""
    if advice is None:
        return None
    return {"disaggregate": advice.disaggregate, "ratio": advice.ratio, "reason": advice.reason,
            "terms": [{"name": term.name, "value": term.value, "how": term.how, "role": term.role} for term in advice.terms]}
