# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters for the tiny models of `models.py`: good ones that change the text, and many ways to be bad."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tandem_worker.lora.adapter import CONFIG_FILE, WEIGHTS_FILE

HIDDEN = 128
LAYERS = 2
RANK = 4
MAX_RANK = 8
Tensors = dict[str, Any]


def tensors_of(seed: int = 1, *, rank: int = RANK, hidden: int = HIDDEN, layers: int = LAYERS, scale: float = 1.0) -> Tensors:
    """Matrices for q_proj and v_proj of every layer."""
    rng = np.random.default_rng(seed)
    made: Tensors = {}
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            made[f"{name}.lora_A.weight"] = (scale * rng.standard_normal((rank, hidden))).astype(np.float32)
            made[f"{name}.lora_B.weight"] = (scale * rng.standard_normal((hidden, rank))).astype(np.float32)
    return made


def config_of(**changes: Any) -> dict[str, Any]:
    """What PEFT writes; a change to None leaves the entry out."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
              "bias": "none", **changes}
    return {name: value for name, value in config.items() if value is not None}


def write_adapter(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    """A folder as PEFT's save_pretrained leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config_of(**changes)))
    return folder


def make_adapter(folder: Path, seed: int = 1) -> Path:
    """One that changes the text; another for each seed."""
    return write_adapter(folder, tensors_of(seed))


def pack(folder: Path, archive: Path, *, inside: str = "adapter") -> Path:
    """A tar.gz with the folder's files in a folder of this name."""
    with tarfile.open(archive, "w:gz") as opened:
        for path in sorted(folder.iterdir()):
            opened.add(path, f"{inside}/{path.name}")
    return archive


@dataclass(frozen=True)
class Bad:
    """An adapter that must be refused: `make` puts it into a folder and returns its path, `reason` is in the sentence."""

    make: Callable[[Path], Path]
    reason: str


def _without(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (make_adapter(folder / "adapter") / name).unlink()
        return folder / "adapter"

    return make


def _with_text(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (make_adapter(folder / "adapter") / name).write_bytes(content)
        return folder / "adapter"

    return make


def _with_config(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: write_adapter(folder / "adapter", tensors_of(), **changes)


def _with_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tensors = tensors_of()
        change(tensors)
        return write_adapter(folder / "adapter", tensors)

    return make


def _of(**shape: int) -> Callable[[Path], Path]:
    return lambda folder: write_adapter(folder / "adapter", tensors_of(**shape), r=shape.get("rank", RANK))


def _cut_off(folder: Path) -> Path:
    weights = make_adapter(folder / "adapter") / WEIGHTS_FILE
    os.truncate(weights, weights.stat().st_size // 2)
    return folder / "adapter"


def _linked_out(folder: Path) -> Path:
    weights = make_adapter(folder / "adapter") / WEIGHTS_FILE
    weights.unlink()
    weights.symlink_to("/etc/passwd")
    return folder / "adapter"


def _archive(*entries: tarfile.TarInfo) -> Callable[[Path], Path]:
    """An adapter's archive with further entries in front."""

    def make(folder: Path) -> Path:
        source = make_adapter(folder / "adapter")
        with tarfile.open(folder / "bad.tar.gz", "w:gz") as archive:
            for entry in entries:
                archive.addfile(entry, io.BytesIO(b"x" * entry.size))
            for path in sorted(source.iterdir()):
                archive.add(path, path.name)
        return folder / "bad.tar.gz"

    return make


def _entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, target, 1 if kind == tarfile.REGTYPE else 0
    return entry


def _broken_archive(folder: Path) -> Path:
    archive = pack(make_adapter(folder / "adapter"), folder / "bad.tar.gz")
    os.truncate(archive, archive.stat().st_size // 2)
    return archive


def _renamed(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.magnitude"] = tensors.popitem()[1]


def _spoilt(tensors: Tensors) -> None:
    next(iter(tensors.values()))[0, 0] = np.nan


def _integers(tensors: Tensors) -> None:
    tensors.update({name: values.astype(np.int32) for name, values in tensors.items()})


BAD = {
    "a folder that isn't there": Bad(lambda folder: folder / "none", "there is no"),
    "outside the roots": Bad(lambda _: Path("/etc"), "outside the folders"),
    "a link that leads out": Bad(_linked_out, "outside the folders"),
    "without its configuration": Bad(_without(CONFIG_FILE), "there is no .*adapter_config"),
    "without weights": Bad(_without(WEIGHTS_FILE), "there is no .*adapter_model"),
    "a configuration that is not JSON": Bad(_with_text(CONFIG_FILE, b"r: 4"), "is not JSON"),
    "a configuration that is a list": Bad(_with_text(CONFIG_FILE, b"[]"), "must be a JSON object"),
    "another kind of adapter": Bad(_with_config(peft_type="IA3"), "is no LoRA"),
    "a rank above the engine's": Bad(_of(rank=MAX_RANK * 2), "--max-lora-rank 16"),
    "a rank of zero": Bad(_with_config(r=0), "r must be a positive integer"),
    "a rank that its weights don't have": Bad(_with_config(r=2), "don't belong together"),
    "no alpha": Bad(_with_config(lora_alpha=None), "lora_alpha"),
    "DoRA": Bad(_with_config(use_dora=True), "use_dora"),
    "a bias": Bad(_with_config(bias="all"), "bias"),
    "whole modules": Bad(_with_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "weights of half their length": Bad(_cut_off, "no whole safetensors file"),
    "weights that are none": Bad(_with_text(WEIGHTS_FILE, b"\xff" * 64), "no whole safetensors file"),
    "no tensors at all": Bad(_with_tensors(dict.clear), "has no tensors"),
    "another base model's shapes": Bad(_of(hidden=96), "made for another model"),
    "layers that the base doesn't have": Bad(_of(layers=3), "has no module model.layers.2"),
    "numbers that are none": Bad(_with_tensors(_spoilt), "infinities or NaNs"),
    "integers": Bad(_with_tensors(_integers), "is of type I32"),
    "tensors that are no LoRA's": Bad(_with_tensors(_renamed), "is no LoRA matrix"),
    "half a pair": Bad(_with_tensors(dict.popitem), "only one of lora_A and lora_B"),
    "an archive that leads out": Bad(_archive(_entry("../../escaped")), "leads out of it"),
    "an archive with an absolute name": Bad(_archive(_entry("/tmp/escaped")), "leads out of it"),
    "an archive with a link": Bad(_archive(_entry(WEIGHTS_FILE, tarfile.SYMTYPE, "/etc/passwd")), "link or device"),
    "an archive with a hard link": Bad(_archive(_entry(WEIGHTS_FILE, tarfile.LNKTYPE, CONFIG_FILE)), "link or device"),
    "an archive with two of a kind": Bad(_archive(_entry(f"other/{CONFIG_FILE}")), "twice"),
    "half an archive": Bad(_broken_archive, "can't be unpacked"),
}
"""Each is refused by its files alone."""


def unsupported_module(folder: Path) -> Path:
    """Passes every check of files; vLLM itself refuses it."""
    tensors = tensors_of()
    name = "base_model.model.model.layers.0.input_layernorm"
    tensors[f"{name}.lora_A.weight"] = np.zeros((RANK, HIDDEN), np.float32)
    tensors[f"{name}.lora_B.weight"] = np.zeros((HIDDEN, RANK), np.float32)
    return write_adapter(folder, tensors)
