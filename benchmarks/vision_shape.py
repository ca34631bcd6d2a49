# SPDX-License-Identifier: Apache-2.0
"""A vision-language model by its shape alone: PaddleOCR-VL's architecture with an 8B language model, for dummy weights.

The architecture has Qwen-VL's grids and rotary positions and needs no torchvision; its encoder is of the size that many models have
(27 layers of 1152). The tokenizer is SmolLM2's with vision tokens added, the processor the architecture's own.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tandem_cli.serve.embedded_model import embedded_model

PATCH = 14
MERGE = 2
IMAGE_TOKEN = "<|IMAGE_PLACEHOLDER|>"
PLACEHOLDER = f"<|IMAGE_START|>{IMAGE_TOKEN}<|IMAGE_END|>"
"""What stands in a prompt for one image."""
_VIDEO_TOKEN = "<|video_pad|>"
_SECTIONS = (16, 24, 24)
TEXT_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 32768, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "mrope_section": list(_SECTIONS), "rope_theta": 500000.0},
}
VISION_27: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                             "image_size": 384, "patch_size": PATCH, "spatial_merge_size": MERGE}


def make_vision_shape(folder: Path, max_pixels: int = 1536 * 1536) -> Path:
    """Writes configuration, tokenizer and processor; no weights, so engines need `load_format=dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = vision_tokenizer()
    config = vision_config(tokenizer, TEXT_8B, VISION_27, "bfloat16")
    config.architectures = ["PaddleOCRVLForConditionalGeneration"]
    config.save_pretrained(folder)
    write_processor(folder, tokenizer, 56 * 56, max_pixels)
    return folder


def vision_tokenizer() -> Any:
    """SmolLM2's with the vision tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(embedded_model()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|IMAGE_START|>", "<|IMAGE_END|>", IMAGE_TOKEN, _VIDEO_TOKEN]})
    return tokenizer


def vision_config(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], dtype: str) -> Any:
    """The model's configuration, with the tokenizer's ids."""
    from transformers import PaddleOCRVLConfig

    own = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
           for name, token in (("image", IMAGE_TOKEN), ("video", _VIDEO_TOKEN), ("vision_start", "<|IMAGE_START|>"),
                               ("vision_end", "<|IMAGE_END|>"))}
    return PaddleOCRVLConfig(text_config={**text, **own}, vision_config=vision, dtype=dtype, tie_word_embeddings=False, **ids)


def write_processor(folder: Path, tokenizer: Any, min_pixels: int, max_pixels: int) -> None:
    """Tokenizer, chat template and image processor; images are scaled to between these numbers of pixels, 784 of which are a token."""
    tokenizer.save_pretrained(folder)
    shutil.copy(embedded_model() / "chat_template.jinja", folder / "chat_template.jinja")
    image = {
        "image_processor_type": "PaddleOCRVLImageProcessor", "processor_class": "PaddleOCRVLProcessor", "patch_size": PATCH,
        "merge_size": MERGE, "temporal_patch_size": 1, "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255, "resample": 3,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "PaddleOCRVLProcessor"}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = {"image_token": IMAGE_TOKEN}  # the processor asks the tokenizer for it by this name
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
