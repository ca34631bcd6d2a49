# SPDX-License-Identifier: Apache-2.0
"""What an adapter is to this worker: its name, the number that the engine knows it by, and where its files are."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import blake3

from tandem_protocol.errors import ConfigError, RequestError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
STATIC_FILE = "multi_lora.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")
_ID_MASK = 0x7FFF_FFFF


class UnknownAdapterError(RequestError):
    """No adapter of this name is loaded."""


class AdapterConflictError(RequestError):
    """The name, or its number, belongs to another adapter."""


@dataclass(frozen=True)
class Adapter:
    """One adapter. vLLM mixes name and path into the hashes of its KV blocks, so equal paths must mean equal weights."""

    name: str
    id: int
    path: str
    """A folder that the engine reads, whenever it has to load the adapter again."""
    uri: str
    """Where it came from; for those of multi_lora.json the path."""


def lora_id(name: str) -> int:
    """The engine's number of an adapter, 1 to 2**31 - 1, the same everywhere. Source: Dynamo's `lora_name_to_id`."""
    return int.from_bytes(blake3.blake3(name.encode()).digest()[:8]) & _ID_MASK or 1


def check_name(name: object) -> str:
    """A name that is fit for URLs, logs and metrics. Raises RequestError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"lora_name {name!r} is not valid: use up to 128 letters, digits and . _ / : -, the first a letter or digit")
    return name


def static_adapters(model_dir: Path) -> tuple[Adapter, ...]:
    """The adapters of `multi_lora.json` (name -> path), as in Triton's vllm_backend; empty without the file. Raises ConfigError."""
    path = model_dir / STATIC_FILE
    if not path.exists():
        return ()
    try:
        given = json.loads(path.read_text()).items()
    except (ValueError, AttributeError) as exc:
        raise ConfigError(f"{path.name} must be a JSON object of adapter name to path: {exc}") from exc
    if any(not source for _, source in given):
        raise ConfigError(f"{path.name} has an adapter without a path: give each the folder of its files")
    return tuple(Adapter(str(name), lora_id(str(name)), str(source), str(source)) for name, source in given)
