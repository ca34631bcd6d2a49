# SPDX-License-Identifier: Apache-2.0
"""What an encode worker asks its engine for and answers. Edge module: vLLM's SamplingParams."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind, SamplingParams

from tandem_protocol import tensors
from tandem_protocol.streams import Arrays


@dataclass
class NothingEncoded:
    """In place of the engine's output for a prompt without images, which needs no engine."""

    finished: bool = True
    outputs: tuple[Any, ...] = ()

    def add(self, next_output: Any, aggregate: bool) -> None:
        """None comes after it."""


def encode_params() -> SamplingParams:
    """An engine that only encodes samples nothing: the request ends when its prompt is consumed."""
    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)


def encode_answer(output: Any, image_ids: tuple[str, ...]) -> Arrays:
    """The one response of an encode worker: by the time it is there, so are the embeddings of all images."""
    del output
    return {tensors.EC_TRANSFER_PARAMS: np.asarray([json.dumps({"image_ids": image_ids}).encode()], dtype=np.object_)}
