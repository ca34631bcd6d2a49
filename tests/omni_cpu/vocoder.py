# SPDX-License-Identifier: Apache-2.0
"""A voice without weights: every token is a tone of its own, so that a test knows which sound a text must have."""

from collections.abc import Iterable
from typing import Any

import torch
from vllm_omni.model_executor.models.output_templates import OmniOutput

RATE_HZ = 8000
SAMPLES_PER_TOKEN = 80
_LOWEST_HZ = 200
_TONES = 50
_APART_HZ = 50


def tone(token: int) -> torch.Tensor:
    """What one token sounds like: (SAMPLES_PER_TOKEN,), from -0.5 to 0.5."""
    hertz = _LOWEST_HZ + token % _TONES * _APART_HZ
    return 0.5 * torch.sin(2 * torch.pi * hertz / RATE_HZ * torch.arange(SAMPLES_PER_TOKEN, dtype=torch.float32))


class ToyVocoder(torch.nn.Module):
    """Takes the tokens of several requests after one another, gives the sound of each."""

    have_multimodal_outputs = True
    has_preprocess = False
    has_postprocess = False
    enable_update_additional_information = False
    requires_raw_input_tokens = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        del vllm_config, prefix

    def embed_input_ids(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """Nobody looks at them."""
        return torch.zeros((input_ids.shape[0], 1))

    def compute_logits(self, hidden_states: Any, sampling_metadata: Any = None) -> None:
        """It samples nothing."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """It has none."""
        return {name for name, _ in weights} & set()

    def make_omni_output(self, model_outputs: Any, **_: Any) -> OmniOutput:
        """As `forward` gave it."""
        return model_outputs if isinstance(model_outputs, OmniOutput) else OmniOutput(*model_outputs)

    def forward(self, input_ids: torch.Tensor, positions: Any = None, intermediate_tensors: Any = None, inputs_embeds: Any = None,
                seq_token_counts: list[int] | None = None, **_: Any) -> OmniOutput:
        """`seq_token_counts`: how many of the tokens are each request's."""
        counts = seq_token_counts or [len(input_ids)]
        parts = input_ids[: sum(counts)].split(counts)
        sounds = [torch.cat([tone(int(token)) for token in part]) if len(part) else torch.zeros(0) for part in parts]
        rate = torch.tensor(RATE_HZ, dtype=torch.int32)
        return OmniOutput(text_hidden_states=None, multimodal_outputs={"model_outputs": sounds, "sr": [rate] * len(sounds)})
