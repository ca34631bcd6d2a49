# SPDX-License-Identifier: Apache-2.0
"""`tandem route` shows what the router answered."""

from typing import Any

from tandem_cli.messages import GenerationRequest, encode
from tandem_cli.route import QUERY, lines


def term(worker: str, cost: float, *, chosen: bool) -> dict[str, Any]:
    """One candidate."""
    return {"worker_id": worker, "dp_rank": 0, "cost": cost, "prefill_blocks": 9.0, "hits": [3, 2, 1], "credit": 1.0,
            "adjusted_prefill_blocks": 4.25, "decode_blocks": 2.0, "active_requests": 7, "chosen": chosen}


def place(worker: str) -> dict[str, Any]:
    """A decision with two candidates."""
    return {"id": worker, "triton_model": "vllm", "grpc_url": "h:1", "cached_tokens": 48, "non_cached_tokens": 96,
            "candidates": [term("b", 12.5, chosen=False), term(worker, 6.25, chosen=True)]}


def test_candidates_are_listed_cheapest_first_with_their_terms() -> None:
    """The chosen one has a star."""
    text = "\n".join(lines({"isl": 144, "blocks": 9, "worker": place("a"), "prefill": {"remote": False, "reason": "because"}}))
    assert "generate on vllm at h:1 (a): 48 tokens cached, 96 to compute" in text
    assert text.index("* ") < text.index("b/0")
    assert "3/2/1" in text
    assert text.endswith("no remote prefill: because")


def test_a_remote_prefill_has_its_own_table() -> None:
    """Both decisions are explained."""
    prefill = {"remote": True, "reason": "long", "worker": place("p")}
    text = "\n".join(lines({"isl": 144, "blocks": 9, "worker": place("a"), "prefill": prefill}))
    assert "prefill on vllm at h:1 (p): long" in text
    assert text.count("b/0") == 2


def test_the_query_is_a_request_parameter() -> None:
    """Booleans stay booleans."""
    message = encode(GenerationRequest(model="router", prompt="x", parameters={**QUERY, "router_worker_id": "w"}))
    assert message.parameters["router_query"].bool_param
    assert message.parameters["router_worker_id"].string_param == "w"
