# SPDX-License-Identifier: Apache-2.0
"""Writes a Stable Diffusion of random weights, a few MB. Run in vllm-omni's environment: `python -m omni_cpu.tiny_diffusion FOLDER`."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 32


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token per byte, in CLIP's alphabet."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(one) for one in shown] + [chr(256 + index) for index in range(256 - len(shown))]
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def make_text_encoder(size: int) -> CLIPTextModel:
    """Two layers."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77,
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1))


def make_unet() -> UNet2DConditionModel:
    """Two blocks down, two up."""
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=WIDTH, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=8)


def main(folder: str) -> None:
    """Seeded."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = make_tokenizer(Path(scratch))
        decoder = AutoencoderKL(block_out_channels=[32, 64], in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
                                up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4)
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                  set_alpha_to_one=False)
        StableDiffusionPipeline(
            vae=decoder, text_encoder=make_text_encoder(len(tokenizer)), tokenizer=tokenizer, unet=make_unet(), scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
