# SPDX-License-Identifier: Apache-2.0
"""What a pipeline is asked when it must show that it computes: one token of its first stage that makes text. Pure.

Stages behind that one aren't asked: nobody but its model knows what a talker or a painter makes in a short time.
"""

from collections.abc import Sequence

from tandem_worker.canary import canary_request
from tandem_worker.omni.pipeline import Order
from tandem_worker.omni.terms import Stage, StageKind

_TEXT = "text"


def text_stage(stages: Sequence[Stage]) -> Stage | None:
    """Whom a canary asks; None where nobody makes text."""
    return next((stage for stage in stages if stage.kind is StageKind.LLM and stage.makes == _TEXT), None)


def canary_order(payload: str, stages: Sequence[Stage], asked: Stage) -> Order:
    """`payload` as from `tandem_worker.canary.parse_payload`, or empty for the default; what the pipeline sets itself is left out."""
    request = canary_request(payload, takes_text=True, bos=None)
    prompt = {"prompt": request.prompt} if isinstance(request.prompt, str) else {"prompt_token_ids": list(request.prompt)}
    own = {name: value for name, value in request.sampling.items() if name in asked.parameters}
    sampling = tuple(own if stage is asked else {} for stage in stages)
    return Order(request.request_id, {"modalities": [_TEXT], **prompt}, sampling, (_TEXT,), streamed=False)
