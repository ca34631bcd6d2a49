# SPDX-License-Identifier: Apache-2.0
"""A profile with its interpolators: what one engine of a role gives, at a correction."""

from dataclasses import dataclass

from tandem_planner.interpolation import DecodeSurface, PrefillCurve
from tandem_planner.profile_data import Profile


@dataclass(frozen=True)
class Capacity:
    """Interpolators of the parts that were profiled."""

    prefill: PrefillCurve | None
    decode: DecodeSurface | None

    @classmethod
    def of(cls, profile: Profile | None) -> "Capacity":
        """Without a profile nothing is known."""
        return cls(
            prefill=PrefillCurve(profile.prefill) if profile and profile.prefill else None,
            decode=DecodeSurface(profile.decode) if profile and profile.decode else None,
        )


@dataclass(frozen=True)
class Demand:
    """Traffic to be served, foreseen or seen."""

    requests_per_s: float
    isl: float
    """Prompt tokens, mean."""
    osl: float
    cached_fraction: float = 0.0

    @property
    def computed_isl(self) -> float:
        """Prompt tokens that are prefilled; the last one always is."""
        return max(1.0, self.isl * (1 - self.cached_fraction))

    @property
    def context(self) -> float:
        """Tokens of KV per request, mean over its generation, as the reference has it."""
        return self.isl + self.osl / 2

    def times(self, factor: float) -> "Demand":
        """The same requests, more or fewer of them."""
        return Demand(self.requests_per_s * factor, self.isl, self.osl, self.cached_fraction)
