# SPDX-License-Identifier: Apache-2.0
"""An Eagle3 head with random weights for any Llama: no trained one is at hand for SmolLM2.

It has what trained heads have: one layer over the token's embedding beside hidden states of three layers of the target, a KV cache of its
own, a vocabulary smaller than the target's with the table between both, and the target's embeddings. Nearly all of its guesses are refused,
which leaves the text, and shows that refusals do.
"""

import json
from pathlib import Path
from typing import Any

VOCABULARY = 4096
"""Tokens that the head can guess, spread evenly over the target's."""
_SPREAD = 0.02
_AS_TARGET = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
              "rope_parameters", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")


def make_eagle3_head(target: Path, folder: Path, seed: int = 0) -> Path:
    """Writes `config.json` and `model.safetensors` of a head for the Llama in `target`; the same for the same seed."""
    import torch
    from safetensors.torch import save_file

    config = head_config(json.loads((target / "config.json").read_text()))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * _SPREAD for name, shape in _matrices(config).items()}
    tensors |= {name: torch.ones(config["hidden_size"]) for name in _NORMS}
    step = config["vocab_size"] // config["draft_vocab_size"]
    guessed = torch.arange(config["draft_vocab_size"]) * step
    known = torch.zeros(config["vocab_size"], dtype=torch.bool)
    known[guessed] = True
    tensors |= {"d2t": guessed - torch.arange(config["draft_vocab_size"]), "t2d": known}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


_NORMS = ("midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight", "midlayer.post_attention_layernorm.weight", "norm.weight")


def head_config(target: dict[str, Any]) -> dict[str, Any]:
    """The head's configuration for a Llama's of two layers or more; the hidden states are an early, the middle and a late layer's."""
    layers = int(target["num_hidden_layers"])
    return {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1, "dtype": "float32",
        "draft_vocab_size": min(VOCABULARY, target["vocab_size"]), "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "eagle_aux_hidden_state_layer_ids": [layers // 10, layers // 2, layers - layers // 10],
        **{name: target[name] for name in _AS_TARGET if name in target},
    }


def _matrices(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Shapes, outputs first. The layer reads the embedding and the hidden state side by side."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = {"q": (queries, 2 * hidden), "k": (keys, 2 * hidden), "v": (keys, 2 * hidden), "o": (hidden, queries)}
    feed_forward = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {"fc.weight": (hidden, 3 * hidden), "lm_head.weight": (config["draft_vocab_size"], hidden),
            **{f"midlayer.self_attn.{name}_proj.weight": shape for name, shape in attention.items()},
            **{f"midlayer.mlp.{name}_proj.weight": shape for name, shape in feed_forward.items()}}
