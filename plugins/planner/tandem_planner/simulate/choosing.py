# SPDX-License-Identifier: Apache-2.0
"""From words to policies: `tandem`, `hpa`, `reference`, `static:PxD`, and the sizes that a fleet begins with."""

from collections.abc import Mapping

from tandem_planner import reference
from tandem_planner.config import NO_BUDGET, PlannerConfig
from tandem_planner.interpolation import DecodeSurface, PrefillCurve
from tandem_planner.plan import Planner
from tandem_planner.profile_data import Profile
from tandem_planner.simulate.policies import HpaPolicy, Policy, ReferencePolicy, StaticPolicy
from tandem_planner.terms import Mode
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

NAMES = ("tandem", "hpa", "reference", "static:SIZES")
_MOST_WORKERS = 1024


def parse_sizes(text: str, mode: Mode) -> dict[Role, int]:
    """`4x2` as workers per role in the mode's order (prefill x decode), `4` for aggregated ones. Raises ConfigError."""
    parts = text.split("x")
    if len(parts) != len(mode.roles) or not all(part.isdigit() and 0 < int(part) <= _MOST_WORKERS for part in parts):
        shape = "PREFILLxDECODE, such as 4x2" if len(mode.roles) > 1 else "one number"
        raise ConfigError(f"{text!r} is no size of a fleet of mode {mode}: give {shape}, each from 1 to {_MOST_WORKERS}")
    return {role: int(part) for role, part in zip(mode.roles, parts, strict=True)}


def make_policy(name: str, config: PlannerConfig, profile: Profile) -> Policy:
    """A fresh policy. Raises ConfigError for a name that there isn't, or a policy that can't scale this mode."""
    kind, _, rest = name.partition(":")
    match kind:
        case "tandem" if not rest:
            return Planner(config, profile)
        case "hpa" if not rest:
            return HpaPolicy(_MOST_WORKERS if config.budget is None else max(1, config.budget // len(config.mode.roles)))
        case "reference" if not rest:
            return _reference(config, profile)
        case "static" if rest:
            return StaticPolicy(parse_sizes(rest, config.mode))
    raise ConfigError(f"--planner {name!r} is none of {', '.join(NAMES)}")


def beginning(name: str, mode: Mode) -> Mapping[Role, int]:
    """The sizes that a fleet has before the first decision: a static one's own, else one worker per role."""
    kind, _, rest = name.partition(":")
    return parse_sizes(rest, mode) if kind == "static" else dict.fromkeys(mode.roles, 1)


def _reference(config: PlannerConfig, profile: Profile) -> ReferencePolicy:
    if config.mode is not Mode.DISAGGREGATED or profile.prefill is None or profile.decode is None:
        raise ConfigError("the reference's formulas are for disaggregated fleets with a whole profile: choose another --planner")
    engines = reference.Engines(config.prefill_engine_num_gpu, config.decode_engine_num_gpu, config.min_endpoint,
                                NO_BUDGET if config.budget is None else config.budget)
    return ReferencePolicy(PrefillCurve(profile.prefill), DecodeSurface(profile.decode), engines, config.itl)
