# SPDX-License-Identifier: Apache-2.0
"""The KVBM benchmark's headline figures from its outcomes."""

import pytest
from benchmarks.kvbm import headline
from benchmarks.kvbm_engine import Outcome


def test_headline_compares_the_variants() -> None:
    """TTFT and throughput are ratios of medians and of best rounds; bandwidth comes from bytes and time of the connector."""
    counters = {'vllm:kv_offload_load_bytes_total{}': 80e9, 'vllm:kv_offload_load_time_total{}': 2.0,
                'vllm:kv_offload_store_bytes_total{}': 50e9, 'vllm:kv_offload_store_time_total{}': 1.0}
    outcomes = {
        "none": Outcome(start_s=1, recomputed_ttft_ms=[900, 1000, 1100], fits_req_per_s=[8, 10]),
        "kvbm": Outcome(start_s=1, recomputed_ttft_ms=[1000], loaded_ttft_ms=[100, 200, 150], fits_req_per_s=[9.9, 9], counters=counters),
        "native": Outcome(start_s=1, loaded_ttft_ms=[300], fits_req_per_s=[9]),
        "kvbm-restarted": Outcome(start_s=1, loaded_ttft_ms=[500]),
        "none-bounded": Outcome(start_s=1, exceeds_req_per_s=[2]), "kvbm-bounded": Outcome(start_s=1, exceeds_req_per_s=[6]),
    }
    figures = headline(outcomes, {"d2h": 50.0, "h2d": 50.0})
    assert figures["g1_g2_of_limit"] == {"store": pytest.approx(1.0), "load": pytest.approx(0.8)}
    assert (figures["ttft_g2_speedup"], figures["ttft_g3_speedup"]) == (pytest.approx(1000 / 150), 2.0)
    assert figures["fits_loss"] == pytest.approx(0.01)
    assert (figures["exceeds_vs_none"], figures["vs_native"]["ttft"], figures["vs_native"]["exceeds"]) == (3.0, 2.0, None)


def test_headline_of_nothing_is_none() -> None:
    """A variant that failed leaves its figures out; it doesn't break the report."""
    figures = headline({}, None)
    assert figures["ttft_g2_speedup"] is None
    assert figures["g1_g2_of_limit"] == {"store": None, "load": None}
