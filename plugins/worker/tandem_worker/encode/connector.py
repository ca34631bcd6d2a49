# SPDX-License-Identifier: Apache-2.0
"""The EC connector by which vLLM engines exchange embeddings through an `EmbeddingStore`. Edge module: vLLM and torch.

vLLM builds one object in the scheduler's process and one per worker rank. An encode worker saves what it encoded; a consumer's
scheduler reads and checks an embedding *before* it says that there is one, and hands the very bytes to its ranks with the step: what
is deleted or spoilt meanwhile changes nothing, since a rank that finds no embedding where one was promised would end the engine. An
image without an embedding is encoded by the consumer itself.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.version import __version__ as vllm_version

from tandem_worker.encode.stats import COUNTERS, EmbeddingCounters
from tandem_worker.encode.store import Bounds, Embedding, EmbeddingStore

_READ_AHEAD = 64
"""Embeddings that a scheduler holds for requests that it could not place yet; beyond that the oldest is read again."""
_MODEL_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")


@dataclass
class EmbeddingLoads(ECConnectorMetadata):  # type: ignore[misc]  # vLLM's classes are Any here
    """What the ranks are to put into their encoder caches before a step."""

    embeddings: dict[str, Embedding] = field(default_factory=dict)


class EmbeddingConnector(ECConnectorBase):  # type: ignore[misc]
    """Producer in encode workers, consumer elsewhere; every method is called on the engine's own thread of its process."""

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        extra = vllm_config.ec_transfer_config.ec_connector_extra_config
        self._store = EmbeddingStore(Path(extra["folder"]), model_identity(vllm_config), Bounds(extra["max_bytes"], extra["ttl_s"]))
        self._read: OrderedDict[str, Embedding] = OrderedDict()
        self._loads: dict[str, Embedding] = {}
        self._counters = EmbeddingCounters()
        self._missed: set[str] = set()
        """Images of waiting requests that were looked for in vain, so that each counts once."""

    # --- scheduler's process ---

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the image need not be encoded here. A consumer holds the checked embedding from then on."""
        if self.is_producer:
            return self._store.has(identifier)
        if identifier in self._read:
            return True
        embedding = self._store.get(identifier)
        if embedding is None:
            self._missed.add(identifier)
            return False
        self._read[identifier] = embedding
        if len(self._read) > _READ_AHEAD:
            self._read.popitem(last=False)
        return True

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """The image will be used in the coming step: its embedding, if there is one, goes along."""
        identifier = request.mm_features[index].identifier
        embedding = self._read.pop(identifier, None)
        if embedding is not None:
            self._loads[identifier] = embedding
            self._counters.loaded(len(embedding.data))
        elif identifier in self._missed:
            self._counters.missed()
        self._missed.discard(identifier)

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """Counts what an encode worker leaves; here, since vLLM's first model runner takes no statistics from encode-only ranks."""
        if self.is_producer:
            for feature in request.mm_features:
                self._counters.ended(is_there=self._store.has(feature.identifier))
        return False, None

    def build_connector_meta(self, scheduler_output: Any) -> EmbeddingLoads:
        """The loads of this step."""
        del scheduler_output
        loads, self._loads = EmbeddingLoads(self._loads), {}
        return loads

    # --- ranks ---

    def start_load_caches(self, encoder_cache: dict[str, Any], **kwargs: Any) -> None:
        """Puts this step's embeddings into the encoder cache."""
        del kwargs
        metadata = self._get_connector_metadata()
        for identifier, embedding in metadata.embeddings.items():
            if identifier not in encoder_cache:
                encoder_cache[identifier] = to_tensor(embedding).to(_device())

    def save_caches(self, encoder_cache: dict[str, Any], mm_hash: str, **kwargs: Any) -> None:
        """Stores what an encode worker's first rank has encoded; all ranks have the same."""
        del kwargs
        if not self.is_producer or get_tensor_model_parallel_rank() != 0:
            return
        self._store.put(mm_hash, from_tensor(encoder_cache[mm_hash]))

    # --- statistics ---

    def get_ec_connector_stats(self) -> "EmbeddingStats | None":
        """What was counted in this process since the last call."""
        counted = self._counters.take()
        return EmbeddingStats(data=dict(counted)) if counted else None

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> "EmbeddingStats | None":
        """From what travelled."""
        return None if data is None else EmbeddingStats(data=data)

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> Any:
        """The counters of `tandem_worker.encode.stats`, beside vLLM's own."""
        return EmbeddingMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class EmbeddingStats(ECConnectorStats):  # type: ignore[misc]
    """Name -> amount of one interval."""

    def reset(self) -> None:
        """Counts from zero again."""
        self.data.clear()

    def aggregate(self, other: Any) -> "EmbeddingStats":
        """Adds another process's."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's periodic log line."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class EmbeddingMetrics(ECConnectorPromMetrics):  # type: ignore[misc]
    """Counters per engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counters = {name: self._counter_cls(name=f"tandem_{name}", documentation=text, labelnames=labelnames)
                    for name, text in COUNTERS.items()}
        self._of_engine = {engine: {name: counter.labels(*values) for name, counter in counters.items()}
                           for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval."""
        for name, amount in transfer_stats_data.items():
            self._of_engine[engine_idx][name].inc(amount)


def model_identity(vllm_config: Any) -> str:
    """Everything that an embedding depends on besides the image; engines with equal ones share embeddings."""
    model = vllm_config.model_config
    folder = Path(str(model.model))
    digest = hashlib.blake2b(digest_size=16)
    for name in _MODEL_FILES:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    mm = model.multimodal_config
    parts = (vllm_version, model.model, model.revision, model.dtype, model.quantization, mm and mm.mm_processor_kwargs, digest.hexdigest())
    return "\0".join(map(str, parts))


def from_tensor(tensor: Any) -> Embedding:
    """Copies a tensor of any device off it; waits for the device."""
    held = tensor.detach().to("cpu").contiguous()
    return Embedding(str(held.dtype).removeprefix("torch."), tuple(held.shape), held.view(torch.uint8).numpy().tobytes())


def to_tensor(embedding: Embedding) -> Any:
    """A tensor in host memory."""
    flat = torch.frombuffer(bytearray(embedding.data), dtype=getattr(torch, embedding.dtype))
    return flat.reshape(embedding.shape)


def _device() -> str:
    """The rank's own: a bare `cuda` would be the first."""
    kind = str(current_platform.device_type)
    return f"{kind}:{current_platform.current_device()}" if current_platform.is_cuda_alike() else kind
