# SPDX-License-Identifier: Apache-2.0
"""What a profile advises: how many prefill workers per decode worker, and whether to disaggregate at all. Pure.

Both kinds of fleet are sized by the planner's own model for one and the same large demand, so that rounding to whole workers hardly
matters; the kind that needs fewer GPUs is advised.
"""

from dataclasses import dataclass
from fractions import Fraction

from tandem_planner.capacity import Capacity, Demand
from tandem_planner.profile_data import Profile
from tandem_planner.sla_plan import SlaModel, Targets
from tandem_planner.terms import Term
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

_FLEET = 40.0
"""Prefill engines that the demand keeps busy."""
_MOST_PARTS = 8
"""Of the ratio: the larger side's workers at most."""


@dataclass(frozen=True)
class Advice:
    """For one kind of traffic and one pair of targets."""

    disaggregate: bool
    prefill: int
    decode: int
    """Workers in the smallest whole ratio, prefill:decode."""
    reason: str
    terms: tuple[Term, ...]

    @property
    def ratio(self) -> str:
        """`P:D`."""
        return f"{self.prefill}:{self.decode}"


def advise(profile: Profile, targets: Targets, isl: float, osl: float, gpus: int = 1, chunk_tokens: int = 8192) -> Advice:
    """`gpus` of one worker of any role; `chunk_tokens` of a prompt per step. Raises ConfigError without a whole profile."""
    if profile.prefill is None or profile.decode is None:
        raise ConfigError("advice needs the profile of prefill and of decode: measure both")
    capacity = Capacity.of(profile)
    assert capacity.prefill is not None
    model = SlaModel(capacity, targets, gpus, gpus)
    demand = Demand(_FLEET / capacity.prefill.ttft_s(isl), isl, osl)
    prefill, decode, both = (model.need(role, demand).workers for role in (Role.PREFILL, Role.DECODE, Role.AGGREGATED))
    stall_s = capacity.prefill.ttft_s(min(isl, chunk_tokens))
    split, whole = (prefill + decode) * gpus, both * gpus
    parts = Fraction(prefill, decode).limit_denominator(_MOST_PARTS) or Fraction(1, _MOST_PARTS)
    terms = (
        Term("demand_requests_per_s", demand.requests_per_s, f"of {isl:g} prompt and {osl:g} generated tokens, for sizing"),
        Term("prefill_workers", prefill, f"TTFT within {targets.ttft_s * 1e3:g} ms", Role.PREFILL),
        Term("decode_workers", decode, f"ITL within {targets.itl_s * 1e3:g} ms", Role.DECODE),
        Term("aggregated_workers", both, "both at once", Role.AGGREGATED),
        Term("prefill_stall_s", stall_s, f"a step of up to {chunk_tokens} prompt tokens holds up what decodes beside it", Role.AGGREGATED),
        Term("gpus_saved", (whole - split) / whole, "share of an aggregated fleet's GPUs that disaggregation saves; transfers aside"),
    )
    return Advice(split < whole, parts.numerator, parts.denominator, _reason(split, whole, stall_s, targets), terms)


def _reason(split: int, whole: int, stall_s: float, targets: Targets) -> str:
    stall = f"a prompt holds up decoding beside it for {stall_s * 1e3:.0f} ms (ITL target {targets.itl_s * 1e3:g} ms)"
    if split < whole:
        return f"disaggregate: {split} GPUs do what {whole} aggregated ones do; {stall}"
    return f"stay aggregated: {whole} GPUs do what {split} disaggregated ones do, without transfers; {stall}"
