# SPDX-License-Identifier: Apache-2.0
"""The cost, term by term."""

from dataclasses import replace

import numpy as np
import pytest

from tandem_router.config import PREFILL_LOAD_SCALE, RouterSettings
from tandem_router.cost import Costs, Loads, Prompt, Weights, costs, explain


def loads(prefill: list[int], blocks: list[float], requests: list[int]) -> Loads:
    """Loads from lists."""
    return Loads(np.array(prefill), np.array(blocks, float), np.array(requests))


def prompt(isl: int, hits: list[list[int]], shared: list[int] | None = None) -> Prompt:
    """A prompt in blocks of 16; hits by tier."""
    found = np.array(hits, np.int32)
    return Prompt(isl, 16, found, np.array(shared or [0] * found.shape[1], np.int32))


def total(weights: Weights, load: Loads, request: Prompt) -> list[float]:
    """The costs."""
    return [float(cost) for cost in costs(weights, load, request).total]


def test_the_cost_of_the_seed() -> None:
    """Potential prefill blocks after hits, plus blocks in flight with the request's own: 1.8.1 of the parity list."""
    load = loads([0, 64, 0], [0, 10, 10], [0, 1, 1])
    assert total(Weights(), load, prompt(160, [[0, 8, 8], [0, 0, 0], [0, 0, 0]], [0, 0, 8])) == [20, 4 + 2 + 20, 2 + 12]


def test_tiers_are_credited_by_their_weight() -> None:
    """Eight blocks save eight on the device, six in host memory, two in storage."""
    found = total(Weights(), loads([0] * 3, [0] * 3, [0] * 3), prompt(160, [[8, 0, 0], [0, 8, 0], [0, 0, 8]]))
    assert found == [2 + 10, 4 + 10, 8 + 10]


def test_prefill_never_costs_less_than_nothing() -> None:
    """Credit beyond the prompt is no bonus."""
    assert total(Weights(), loads([0], [0], [0]), prompt(17, [[2], [0], [0]])) == [2]


def test_weights_scale_their_terms() -> None:
    """Prefill term, and a term per request in flight."""
    load = loads([160], [5], [3])
    assert total(Weights(prefill_load_scale=2), load, prompt(160, [[0], [0], [0]])) == [40 + 15]
    assert total(Weights(active_request=4), load, prompt(160, [[0], [0], [0]])) == [20 + 15 + 12]
    assert total(Weights(overlap_credit=0.5), load, prompt(160, [[10], [0], [0]])) == [15 + 15]
    assert total(Weights().with_prefill_scale(0), load, prompt(160, [[0], [0], [0]])) == [15]


def test_credit_decays_with_the_excess_backlog() -> None:
    """A worker that is one prompt's length behind the idlest gets half of the credit at decay 1; the idlest gets all."""
    found = costs(Weights(credit_decay=1), loads([160, 0], [0, 0], [1, 0]), prompt(160, [[10, 10], [0, 0], [0, 0]]))
    assert found.credit.tolist() == [0.5, 1]
    assert found.adjusted_prefill_blocks.tolist() == [15, 0]


def test_without_tracking_prefill_stands_for_decode() -> None:
    """Rounded down, as in the parity list; also the weights come from the settings."""
    weights = Weights.of(RouterSettings(router_track_active_blocks=False))
    assert total(weights, loads([0], [99], [1]), prompt(40, [[0], [0], [0]])) == [PREFILL_LOAD_SCALE * 2.5 + 2]


def test_what_is_only_believed_is_worth_the_work_it_saves_at_most() -> None:
    """Of ten hits four are not confirmed: with a credit of 2 they count once, with one of 0.5 like the others."""
    request = replace(prompt(480, [[10], [0], [0]]), believed=np.array([4], np.int32))
    load = loads([0], [0], [0])
    assert costs(Weights(overlap_credit=2.0), load, request).adjusted_prefill_blocks == [30 - 2 * 6 - 4]
    assert costs(Weights(overlap_credit=0.5), load, request).adjusted_prefill_blocks == [30 - 0.5 * 10]


def test_terms_explain_the_cost() -> None:
    """The terms of a candidate add up to its cost."""
    load = loads([16, 0], [3, 0], [2, 0])
    request = prompt(160, [[4, 0], [2, 0], [1, 0]])
    found: Costs = costs(Weights(active_request=2), load, request)
    first, second = explain([("a", 0), ("b", 1)], found, load, request.hits, chosen=1)
    assert (first.worker_id, first.hits, first.chosen, second.dp_rank, second.chosen) == ("a", (4, 2, 1), False, 1, True)
    assert first.adjusted_prefill_blocks == pytest.approx(first.prefill_blocks - 4 - 2 * 0.75 - 0.25)
    assert first.cost == pytest.approx(first.adjusted_prefill_blocks + first.decode_blocks + 2 * first.active_requests)
