# SPDX-License-Identifier: Apache-2.0
"""The handoff from a prefill to a decode worker: the connector's own dict, as JSON, passed on verbatim.

Its fields belong to the connector (for NIXL: remote engine, host, port, block ids per KV-cache group) and may change
with every vLLM release, so Tandem reads none of them but the two that say which leg a request is.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tandem_protocol.errors import RequestError

PREFILL_REQUEST: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""What a prefill worker asks its connector for: compute, keep the blocks, and answer with the handoff."""
SPECULATION = "tandem_speculation"
"""Not the connector's: how the prefill worker speculates; absent if it doesn't."""
KVBM_PRIORITY = "kvbm_priority"
"""Not the connector's: what a client's blocks are worth to the KV tiers, an integer. It travels in the same dict, the only one of a
request's that vLLM shows to tiers."""
DATA_PARALLEL_RANK = "data_parallel_rank"
"""Sampling parameter: the rank of the worker that is to serve the request; the worker's own choice without it."""
IMAGE_IDS = "image_ids"
"""Not the connector's: content ids of the images that the prompt was computed with, in order; absent without images."""
KVBM_WORTH = 100
"""The most and, negative, the least: stores keep an order of blocks per worth, and clients must not make them keep millions."""


def encode(params: dict[str, Any]) -> bytes:
    """The handoff as it travels in the tensor `kv_transfer_params`."""
    return json.dumps(params, separators=(",", ":")).encode()


def speculation_of(params: Mapping[str, Any]) -> str:
    """How the prefill worker of this handoff speculates; empty if it doesn't."""
    return str(params.get(SPECULATION, ""))


def decode(raw: bytes) -> dict[str, Any]:
    """Parses the tensor; raises RequestError for anything that is not a prefill worker's answer."""
    try:
        params = json.loads(raw)
    except ValueError as exc:
        raise RequestError(f"kv_transfer_params is not JSON ({exc}): pass the prefill model's output on as it is") from exc
    if not isinstance(params, dict) or params.get("do_remote_prefill") is not True:
        raise RequestError("kv_transfer_params is not a prefill answer: pass the prefill model's output on as it is")
    return params


def check_images(params: dict[str, Any], image_ids: Sequence[str]) -> None:
    """Raises RequestError unless decode has the very images that prefill had: their sizes decide where every token stands."""
    computed = params.get(IMAGE_IDS)
    if computed is not None and list(computed) != list(image_ids):
        raise RequestError("an image is not the one that the prompt was computed with: a URL changed between prefill and decode, "
                           "send the files in base64")
