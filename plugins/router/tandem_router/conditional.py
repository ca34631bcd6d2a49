# SPDX-License-Identifier: Apache-2.0
"""Whether a prompt is worth a remote prefill, once its decode worker is known.

The decode worker's own prefix hit decides: what it must compute anyway may be less than a transfer costs.
"""

from dataclasses import dataclass

from tandem_protocol.errors import UnavailableError
from tandem_router.config import RouterSettings


@dataclass(frozen=True)
class PrefillRoute:
    """Where the prompt is prefilled, and why in one sentence."""

    remote: bool
    reason: str


def prefill_route(non_cached_tokens: int, isl: int, settings: RouterSettings, *, prefill_available: bool,
                  alone: str = "") -> PrefillRoute:
    """Decides by exact token counts; `non_cached_tokens` of the prompt's `isl` are not on the decode worker yet.

    `alone`: why none of the prefill workers fits the decode worker; empty if one does.

    UnavailableError if disaggregation is enforced and no prefill worker can be had.
    """
    if not prefill_available:
        if settings.enforce_disagg:
            raise UnavailableError("no prefill worker is available and disaggregation is enforced: start one, or unset DYN_ENFORCE_DISAGG")
        return PrefillRoute(False, "no prefill worker is available, so the decode worker prefills")
    if alone:
        if settings.enforce_disagg:
            raise UnavailableError(f"disaggregation is enforced, and {alone}")
        return PrefillRoute(False, f"{alone}; the decode worker prefills")
    if not settings.router_conditional_disagg:
        return PrefillRoute(True, "every prompt is prefilled remotely (DYN_ROUTER_CONDITIONAL_DISAGG is off)")
    return _by_length(non_cached_tokens, isl, settings.conditional_disagg_tokens)


def _by_length(non_cached_tokens: int, isl: int, threshold: int) -> PrefillRoute:
    remote = non_cached_tokens >= threshold
    sign = ">=" if remote else "<"
    return PrefillRoute(remote, f"{non_cached_tokens} of {isl} tokens are not cached on the decode worker: {sign} {threshold}")
