# SPDX-License-Identifier: Apache-2.0
"""What a stage makes of the one before it, as vllm-omni calls it: outputs and the request's own prompt in, a prompt out.

`speech_in_chunks` is another kind: it runs beside the first stage, after each of its steps, and what it returns goes through a connector.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm_omni.data_entry_keys import CodesStruct, MetaStruct, OmniPayloadStruct

_PASSED_ON = ("negative_prompt", "multi_modal_data")
CHUNK_TOKENS = 2


def painting(source_outputs: Sequence[Any], prompt: Any = None, requires_multimodal_data: bool = False) -> dict[str, Any]:
    """The text becomes the picture's prompt; what shall not be seen, and images, are the request's own."""
    del requires_multimodal_data
    asked = prompt if isinstance(prompt, Mapping) else {}
    passed = {name: asked[name] for name in _PASSED_ON if asked.get(name) is not None}
    return {"prompt": source_outputs[0].outputs[0].cumulative_text, **passed}


def speech(source_outputs: Sequence[Any], prompt: Any = None, requires_multimodal_data: bool = False) -> list[dict[str, Any]]:
    """The text's tokens are what the voice speaks."""
    del prompt, requires_multimodal_data
    return [{"prompt_token_ids": list(source_outputs[0].outputs[0].cumulative_token_ids)}]


def speech_in_chunks(transfer_manager: Any, multimodal_output: Any, request: Any, is_finished: bool = False) -> OmniPayloadStruct | None:
    """Two tokens at a time while the text goes on; at least one is kept for the last chunk, since an empty one is never spoken."""
    del multimodal_output
    finished = bool(is_finished or request.is_finished())
    sent = transfer_manager.request_payload.setdefault(request.external_req_id, {"tokens": 0})
    new = list(request.output_token_ids)[sent["tokens"]:]
    if not new or (len(new) <= CHUNK_TOKENS and not finished):
        return None
    chunk = new if finished else new[:CHUNK_TOKENS]
    sent["tokens"] += len(chunk)
    # Codes of one dimension arrive as tokens.
    mark = torch.tensor(finished)
    return OmniPayloadStruct(codes=CodesStruct(audio=torch.tensor(chunk)), meta=MetaStruct(finished=mark, req_id=[request.external_req_id]))
