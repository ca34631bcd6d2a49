# SPDX-License-Identifier: Apache-2.0
"""When a prompt is prefilled remotely."""

import pytest

from tandem_protocol.errors import UnavailableError
from tandem_router.conditional import prefill_route
from tandem_router.config import RouterSettings

CONDITIONAL = RouterSettings(router_conditional_disagg=True, conditional_disagg_tokens=100)


@pytest.mark.parametrize(("non_cached", "remote"), [(99, False), (100, True), (5000, True)])
def test_exact_tokens_decide(non_cached: int, remote: bool) -> None:
    """What the decode worker has already does not count, however long the prompt is."""
    found = prefill_route(non_cached, 5000, CONDITIONAL, prefill_available=True)
    assert found.remote is remote
    assert f"{non_cached} of 5000 tokens" in found.reason


def test_unconditional_is_always_remote() -> None:
    """Even for one token."""
    assert prefill_route(1, 1, RouterSettings(), prefill_available=True).remote


def test_without_prefill_workers_the_decode_worker_prefills() -> None:
    """Unless disaggregation is enforced."""
    assert not prefill_route(5000, 5000, RouterSettings(), prefill_available=False).remote
    with pytest.raises(UnavailableError, match="DYN_ENFORCE_DISAGG"):
        prefill_route(5000, 5000, RouterSettings(enforce_disagg=True), prefill_available=False)
