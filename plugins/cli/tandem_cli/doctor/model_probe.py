# SPDX-License-Identifier: Apache-2.0
"""Looks at a model's files: whether they are all there, and whole. Reads headers only; never raises."""

import json
import struct
from pathlib import Path
from typing import Any

from tandem_cli.doctor.facts import ModelFacts
from tandem_cli.serve.preflight import check_model, weights_bytes
from tandem_protocol.errors import ConfigError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_POINTER = b"version https://git-lfs"
_LONGEST_HEADER = 100 << 20


def probe_model(model: str) -> ModelFacts:
    """A folder's files; of a hub id, only whether it can be had."""
    try:
        check_model(model)
    except ConfigError as exc:
        return ModelFacts(model, error=str(exc))
    folder = Path(model)
    if not folder.is_dir():
        return ModelFacts(model)
    return ModelFacts(model, weights_bytes(folder), tuple(_problems(folder)))


def _problems(folder: Path) -> list[str]:
    found = [] if _json(folder / "config.json") is not None else ["config.json is not JSON"]
    if not any((folder / name).exists() for name in _TOKENIZERS):
        found.append("there is no tokenizer")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards and not any(folder.glob("*.bin")) and not any(folder.glob("*.pt")):
        found.append("there are no weights")
    index = _json(folder / "model.safetensors.index.json") or {}
    missing = {str(name) for name in index.get("weight_map", {}).values()} - {shard.name for shard in shards}
    found.extend(f"{name} is missing" for name in sorted(missing))
    found.extend(problem for shard in shards if (problem := _shard_problem(shard)))
    return found


def _shard_problem(shard: Path) -> str:
    """A safetensors file says how long it is: 8 bytes of header length, the header, and the tensors' end offsets."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        start = file.read(len(_POINTER))
        if start == _POINTER:
            return f"{shard.name} is a git-lfs pointer, not the file"
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else _LONGEST_HEADER + 1
        if length > min(size, _LONGEST_HEADER):
            return f"{shard.name} is not a safetensors file"
        file.seek(8)
        header = file.read(length)
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{shard.name} has a broken header"
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"{shard.name} has {size} bytes and should have {expected}"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
