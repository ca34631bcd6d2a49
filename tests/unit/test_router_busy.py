# SPDX-License-Identifier: Apache-2.0
"""Who is busy, by each threshold."""

import numpy as np
import pytest

from tandem_protocol.errors import ConfigError
from tandem_router.busy import BusyThresholds, Capacities, busy
from tandem_router.config import RouterSettings
from tandem_router.cost import Loads

LOADS = Loads(np.array([0, 2048, 2049]), np.array([500.0, 501.0, 0.0]), np.array([1, 1, 1]))
ROOM = Capacities(np.array([1000, 1000, 1000]), np.array([2048, 1024, 2049]))


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [(BusyThresholds(), [False, False, False]),
     (BusyThresholds(active_decode_blocks=0.5), [False, True, False]),
     (BusyThresholds(active_prefill_tokens=2048), [False, False, True]),
     (BusyThresholds(active_prefill_tokens_frac=1.0), [False, True, False]),
     (BusyThresholds(active_decode_blocks=0.5, active_prefill_tokens=2048), [False, True, True]),
     (BusyThresholds(active_prefill_tokens=0), [False, True, True])],
)
def test_each_threshold(thresholds: BusyThresholds, expected: list[bool]) -> None:
    """Busy is beyond a limit, not at it; any one limit is enough."""
    assert busy(thresholds, LOADS, ROOM).tolist() == expected


def test_settings_carry_thresholds() -> None:
    """Unset ones never apply."""
    assert not BusyThresholds.of(RouterSettings()).any_set
    found = BusyThresholds.of(RouterSettings(active_decode_blocks_threshold=0.9, active_prefill_tokens_threshold_frac=2))
    assert found.any_set
    assert str(found) == "active_decode_blocks > 0.9, active_prefill_tokens_frac > 2"


@pytest.mark.parametrize("thresholds", [
    {"active_decode_blocks": 85}, {"active_prefill_tokens": -1}, {"active_prefill_tokens_frac": float("nan")},
])
def test_senseless_thresholds_are_refused(thresholds: dict[str, float]) -> None:
    """A percentage is not a share."""
    with pytest.raises(ConfigError, match=next(iter(thresholds))):
        BusyThresholds(**thresholds)  # type: ignore[arg-type] # what an operator may send
