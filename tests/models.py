# SPDX-License-Identifier: Apache-2.0
"""Tiny models for tests in which the text does not matter: two random layers under SmolLM2's tokenizer, and a LoRA for them."""

import json
import shutil
from pathlib import Path

from tandem_cli.serve.embedded_model import embedded_model

HIDDEN = 128
RANK = 4


def make_tiny_model(folder: Path) -> Path:
    """A Llama of two layers with random weights (seeded); starts and steps fast."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model() / name, folder / name)
    return folder


def make_lively_model(folder: Path) -> Path:
    """As the tiny model, in float32 and with weights so large that every token depends on all before it: a wrong block shows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, dtype="float32",
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model() / name, folder / name)
    return folder


def make_lora(folder: Path) -> Path:
    """An adapter for the tiny model that changes its text: random weights, large enough to matter."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(2):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, HIDDEN)
            tensors[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
              "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
