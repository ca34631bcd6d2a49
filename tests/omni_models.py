# SPDX-License-Identifier: Apache-2.0
"""Models of the pipelines of omni_cpu that have several stages or take images, with their deploy configurations."""

import json
import shutil
from pathlib import Path
from typing import Any

from omni_rig import make_tiny_diffusion

WORDS = 6
"""Tokens that the thinker makes unless a request says otherwise."""
SIZE = 32
"""Pixels of the painter's pictures, as WORDS."""
STORY: dict[str, Any] = {
    "async_chunk": False,
    "dtype": "float32",
    "stages": [
        {"stage_id": 0, "devices": "0", "gpu_memory_utilization": 0.3, "enforce_eager": True, "max_model_len": 512,
         "default_sampling_params": {"temperature": 0.0, "max_tokens": WORDS, "ignore_eos": True}},
        {"stage_id": 1, "devices": "0", "diffusion_load_format": "diffusers",
         "default_sampling_params": {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "seed": 1}},
    ],
}
_SHARED_MEMORY = {"codec_streaming": True, "connector_get_sleep_s": 0.01, "connector_get_max_wait_first_chunk": 3000,
                  "connector_get_max_wait": 300}
SPEECH: dict[str, Any] = {
    "async_chunk": True,
    "dtype": "float32",
    "connectors": {"shared_memory": {"name": "SharedMemoryConnector", "extra": _SHARED_MEMORY}},
    "stages": [
        {**STORY["stages"][0], "output_connectors": {"to_stage_1": "shared_memory"}},
        {"stage_id": 1, "devices": "0", "gpu_memory_utilization": 0.3, "enforce_eager": True, "max_model_len": 512, "load_format": "dummy",
         "input_connectors": {"from_stage_0": "shared_memory"}},
    ],
}
_VOICE = {"model_type": "llama", "architectures": ["TandemToyVocoder"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
          "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 49152, "max_position_embeddings": 4096}


def make_story(environment: Path, folder: Path, thinker: Path) -> Path:
    """The text model below the picture model, as GLM-Image has it."""
    target = make_tiny_diffusion(environment, folder)
    return _pipeline(target, "tandem_story", thinker)


def make_speech(folder: Path, thinker: Path) -> Path:
    """The voice has no weights."""
    target = folder / "speech"
    (target / "voice").mkdir(parents=True)
    (target / "voice" / "config.json").write_text(json.dumps(_VOICE))
    return _pipeline(target, "tandem_speech", thinker)


def make_redrawing(environment: Path, folder: Path) -> Path:
    """The picture model as one that begins with a picture."""
    target = make_tiny_diffusion(environment, folder)
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionImg2ImgPipeline"}))
    return target


def _pipeline(target: Path, model_type: str, thinker: Path) -> Path:
    shutil.copytree(thinker, target / "thinker")
    (target / "config.json").write_text(json.dumps({"model_type": model_type}))
    return target
