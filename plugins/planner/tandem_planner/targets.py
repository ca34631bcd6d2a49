# SPDX-License-Identifier: Apache-2.0
"""Targets that the profile can't reach are refused at start, with what it can reach: no number of workers would help."""

from tandem_planner.capacity import Capacity
from tandem_planner.config import PlannerConfig
from tandem_planner.terms import Mode
from tandem_protocol.errors import ConfigError


def check_targets(config: PlannerConfig, capacity: Capacity) -> None:
    """Raises ConfigError for the first target that is out of reach at the configured lengths, and for a profile that lacks a part."""
    if config.mode is not Mode.DECODE:
        _check_ttft(config, capacity)
    if config.mode is not Mode.PREFILL:
        _check_itl(config, capacity)


def _check_ttft(config: PlannerConfig, capacity: Capacity) -> None:
    if capacity.prefill is None:
        raise ConfigError("the profile has no prefill figures: measure them with `tandem profile`, or choose --mode decode")
    best = capacity.prefill.ttft_s(config.isl) * 1e3
    if best > config.ttft:
        longest = capacity.prefill.longest_within(config.ttft_s)
        hint = f"; it is up to ISL {longest:.0f}" if longest is not None else ""
        raise ConfigError(f"TTFT {config.ttft:g} ms is not reachable at ISL {config.isl:g}: the profile's best is {best:.0f} ms{hint}")


def _check_itl(config: PlannerConfig, capacity: Capacity) -> None:
    if capacity.decode is None:
        raise ConfigError("the profile has no decode figures: measure them with `tandem profile`, or choose --mode prefill")
    context = config.isl + config.osl / 2
    best = capacity.decode.least_itl_s(context) * 1e3
    if best > config.itl:
        raise ConfigError(f"ITL {config.itl:g} ms is not reachable at a context of {context:g} tokens: the profile's best is {best:.1f} ms")
