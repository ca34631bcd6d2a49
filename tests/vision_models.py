# SPDX-License-Identifier: Apache-2.0
"""A tiny vision-language model for tests: a PaddleOCR-VL of two layers and two vision blocks with random weights, float32.

It has Qwen-VL's grids (`image_grid_thw`) and its three-dimensional rotary positions, and unlike Qwen-VL it runs without torchvision,
which the CPU environment lacks. An image is 4 to 36 tokens. Weights are so large that every token depends on all before it: another
image, another text.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from benchmarks.vision_shape import MERGE, PATCH, PLACEHOLDER, vision_config, vision_tokenizer, write_processor

if TYPE_CHECKING:
    import torch

__all__ = ["PLACEHOLDER", "make_image", "make_vision_model"]

HIDDEN = 128
_TEXT = {
    "hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 4096, "dtype": "float32",
    "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
}
_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112,
           "patch_size": PATCH, "spatial_merge_size": MERGE}


def make_vision_model(folder: Path) -> Path:
    """Writes weights, tokenizer and processor into `folder`; seeded, a few seconds."""
    import torch
    from transformers import PaddleOCRVLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = vision_tokenizer()
    torch.manual_seed(0)
    model = PaddleOCRVLForConditionalGeneration(vision_config(tokenizer, _TEXT, _VISION, "float32")).to(torch.float32)
    _enliven(model)
    model.save_pretrained(folder)
    write_processor(folder, tokenizer, 56 * 56, 168 * 168)
    return folder


def make_image(seed: int, width: int = 112, height: int = 84, form: str = "PNG") -> bytes:
    """A file with random pixels, of which the processor makes (width / 28) x (height / 28) tokens."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def _enliven(model: "torch.nn.Module") -> None:
    """Weights as initialised tell hardly two images apart; here an image matters as much as its words do."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)
            elif "bias" in name:
                torch.nn.init.zeros_(weight)
