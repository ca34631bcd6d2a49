# SPDX-License-Identifier: Apache-2.0
"""Puts a worker's adapters together: settings, the engine's own configuration, and the edges to S3 and the hub."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from tandem_protocol.errors import RequestError
from tandem_worker.config import WorkerSettings
from tandem_worker.lora.adapter import Adapter
from tandem_worker.lora.adapters import Adapters
from tandem_worker.lora.checks import Fit
from tandem_worker.lora.fetch import Fetcher
from tandem_worker.lora.hub import HubFiles
from tandem_worker.lora.s3 import S3Files, S3Place
from tandem_worker.lora.store import CopyStore
from tandem_worker.lora.terms import Limits
from tandem_worker.lora.vllm_loras import VllmLoras
from tandem_worker.lora.weights import Tensor, base_shapes

log = logging.getLogger(__name__)


def build_adapters(engine: Any, settings: WorkerSettings, listed: Sequence[Adapter]) -> Adapters:
    """The adapters of an engine, which begin with those `listed` in multi_lora.json."""
    folder = Path(settings.lora_path).expanduser()
    store = CopyStore(folder)
    if settings.lora_enabled and (swept := store.sweep()):
        log.info("lora.swept copies=%d", swept)
    place = S3Place(settings.lora_s3_endpoint, settings.lora_s3_region, settings.lora_s3_allow_http)
    fetcher = Fetcher(store, _roots(settings, folder), int(settings.lora_max_gb * 1e9), _fit(engine, settings), S3Files(place), HubFiles())
    limits = Limits(settings.lora_enabled, settings.lora_load_timeout_s, settings.drain_timeout_s, settings.lora_max_adapters)
    return Adapters(VllmLoras(engine), fetcher, limits, listed)


def _roots(settings: WorkerSettings, folder: Path) -> tuple[Path, ...]:
    given = [Path(root).expanduser() for root in settings.lora_roots.split(":") if root]
    return tuple(root.resolve() for root in given or [folder])


def _fit(engine: Any, settings: WorkerSettings) -> Fit:
    lora = engine.vllm_config.lora_config
    if lora is None or not settings.lora_enabled:
        return Fit(0)
    model = engine.model_config
    # Modules of multimodal models are called otherwise in adapters than in checkpoints: there the engine judges.
    return Fit(int(lora.max_lora_rank), {} if model.is_multimodal_model else _base(str(model.model)))


def _base(model: str) -> dict[str, Tensor]:
    """The base model's tensors, where its files are on this host as safetensors."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(model, "config.json")
        except ValueError:
            return {}
        if not isinstance(cached, str):
            return {}
        folder = Path(cached).parent
    try:
        return base_shapes(folder)
    except RequestError as exc:
        log.warning("lora.base_unknown model=%s reason=%s: shapes of adapters are left to the engine", model, exc)
        return {}
