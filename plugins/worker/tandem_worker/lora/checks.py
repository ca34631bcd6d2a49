# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter fits the engine, from its files alone: what is refused here never reaches the engine.

What this can't know (which modules vLLM supports in this model) the engine says itself when it loads the adapter.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem_protocol.errors import RequestError
from tandem_worker.lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from tandem_worker.lora.weights import Tensor, check_finite, read_header

_MOST_CONFIG_BYTES = 1 << 20
_LORA_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)\.weight")
_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
_NO_MODULES_OF_THEIR_OWN = frozenset({"lm_head"})
"""A model whose embeddings are tied has no tensor of this name."""


@dataclass(frozen=True)
class Fit:
    """What the engine can take."""

    max_rank: int
    base: Mapping[str, Tensor] = field(default_factory=dict)
    """The base model's tensors, or none where they aren't known: then shapes are left to the engine."""


def check_folder(folder: Path, fit: Fit) -> None:
    """Raises RequestError, with the reason, for an adapter that the engine can't use."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise RequestError(f"the adapter has no {name}: give the folder that PEFT's save_pretrained wrote, with safetensors")
    rank, patterns = _check_config(_config(folder / CONFIG_FILE), fit.max_rank)
    tensors = read_header(folder / WEIGHTS_FILE)
    for module, (down, up) in _pairs(tensors).items():
        if down.shape[0] != up.shape[1] or (not patterns and down.shape[0] != rank):
            raise RequestError(f"{module} has rank {down.shape[0]} and {up.shape[1]}, {CONFIG_FILE} says {rank}: "
                               "the files don't belong together")
        if fit.base:
            _check_module(module, down, up, fit.base)
    check_finite(folder / WEIGHTS_FILE, tensors)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes()[:_MOST_CONFIG_BYTES])
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"{path.name} is not JSON ({exc}): save the adapter anew") from exc
    if not isinstance(config, dict):
        raise RequestError(f"{path.name} must be a JSON object, as PEFT writes it")
    return config


def _check_config(config: dict[str, Any], max_rank: int) -> tuple[int, bool]:
    """The rank, and whether single modules have their own."""
    if config.get("peft_type", "LORA") != "LORA":
        raise RequestError(f"{CONFIG_FILE}: peft_type {config['peft_type']!r} is no LoRA, and vLLM has no other adapters")
    rank: Any = config.get("r")
    alpha, patterns = config.get("lora_alpha"), config.get("rank_pattern") or {}
    if not _is_positive(rank, int):
        raise RequestError(f"{CONFIG_FILE}: r must be a positive integer, not {rank!r}")
    if not _is_positive(alpha, int | float):
        raise RequestError(f"{CONFIG_FILE}: lora_alpha must be a positive number, not {alpha!r}")
    if not isinstance(patterns, dict) or not all(_is_positive(value, int) for value in patterns.values()):
        raise RequestError(f"{CONFIG_FILE}: rank_pattern must map names to positive integers")
    highest = max([rank, *patterns.values()])
    if highest > max_rank:
        raise RequestError(f"the adapter's rank {highest} is above the engine's {max_rank}: start it with --max-lora-rank {highest}")
    if not isinstance(config.get("target_modules"), list | str) or not config["target_modules"]:
        raise RequestError(f"{CONFIG_FILE}: target_modules is missing")
    for name in ("use_dora", "lora_bias", "modules_to_save"):
        if config.get(name):
            raise RequestError(f"{CONFIG_FILE}: vLLM does not support {name}: train without it")
    if config.get("bias", "none") != "none":
        raise RequestError(f"{CONFIG_FILE}: vLLM does not support bias={config['bias']!r}: train without it")
    return int(rank), bool(patterns)


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < float("inf")


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> its A and B."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _LORA_TENSOR.fullmatch(name)
        if found is None or len(tensor.shape) != 2:
            raise RequestError(f"tensor {name} of shape {list(tensor.shape)} is no LoRA matrix: "
                               "only lora_A.weight and lora_B.weight of two dimensions are known")
        halves.setdefault(found[1], {})[found[2]] = tensor
    if not halves:
        raise RequestError(f"{WEIGHTS_FILE} has no tensors: save the adapter anew")
    alone = [module for module, pair in halves.items() if len(pair) < 2]
    if alone:
        raise RequestError(f"{alone[0]} has only one of lora_A and lora_B: save the adapter anew")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _check_module(module: str, down: Tensor, up: Tensor, base: Mapping[str, Tensor]) -> None:
    weight = base.get(f"{module}.weight")
    if weight is None:
        if module in _NO_MODULES_OF_THEIR_OWN or any(name.startswith(f"{module}.") for name in base):
            return  # quantized, or otherwise not for us to judge
        raise RequestError(f"the base model has no module {module}: the adapter was made for another model")
    if weight.dtype in _PLAIN and len(weight.shape) == 2 and weight.shape != (up.shape[0], down.shape[1]):
        raise RequestError(f"{module} is {list(weight.shape)} in the base model, and {[up.shape[0], down.shape[1]]} in the adapter: "
                           "it was made for another model")
