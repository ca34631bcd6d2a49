# SPDX-License-Identifier: Apache-2.0
"""DiskTier: what vLLM loads by `{"type": "DiskTier", "module_path": "tandem_kvbm.disk.tier", "folder": ..., "quota_bytes": ...}`."""

from typing import Any

from tandem_kvbm.disk.options import DiskOptions
from tandem_kvbm.disk.store import DiskStore
from tandem_kvbm.layout import layout_of
from tandem_kvbm.policies.admission import Admission
from tandem_kvbm.tier import StoreTier, TierOptions


class DiskTier(StoreTier):
    """G3. `disk` are the fields of DiskOptions; `tier` those of TierOptions."""

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, *, backpressure_detector: Any = None,
                 locality: str | None = "LOCAL", admission_filter: bool = True, namespace: str = "",
                 tier: dict[str, Any] | None = None, **disk: Any) -> None:  # fmt: skip
        options = DiskOptions(**disk)
        strides = primary_kv_view.strides
        assert strides is not None
        layout = layout_of(offloading_spec.config, strides[0], namespace)
        store = DiskStore(options, layout, first_seat=offloading_spec.config.parallel.data_parallel_index)
        super().__init__(
            offloading_spec, primary_kv_view, tier_type, store, backpressure_detector=backpressure_detector, locality=locality,
            options=TierOptions(**(tier or {})), admission=Admission() if admission_filter else None,
        )
