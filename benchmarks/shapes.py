# SPDX-License-Identifier: Apache-2.0
"""Models by their shape alone, for vLLM's `load_format=dummy`: where speed matters and text doesn't, and no model hub is at hand.

`python -m benchmarks.shapes TOKENIZER_FOLDER FOLDER` writes an 8B model's: Llama-3.1-8B's config with another model's tokenizer and
vocabulary.
"""

import json
import shutil
import sys
from pathlib import Path

_NOT_TOKENIZER = ("config.json", "generation_config.json")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "torch_dtype": "bfloat16",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 49152, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_theta": 500000.0,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}


def make_8b_shape(tokenizer: Path, folder: Path) -> Path:
    """A model folder without weights; `tokenizer` is a model folder whose vocabulary has at most 49,152 entries."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        if file.is_file() and file.name not in _NOT_TOKENIZER and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B, indent=1))
    return folder


if __name__ == "__main__":
    make_8b_shape(Path(sys.argv[1]), Path(sys.argv[2]))
