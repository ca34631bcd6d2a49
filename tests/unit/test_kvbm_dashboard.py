# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard asks for metrics that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import get_connector_metric_definitions
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingHistogramMetadata

from tandem_kvbm.metrics import METRICS
from tandem_kvbm.spec import KvbmSpec

BOARD = json.loads((Path(__file__).parents[2] / "dashboards" / "kvbm.json").read_text())
ALL_TIERS = {"cpu_cache_gb": 1, "disk_cache_gb": 1, "object_enabled": True, "object_bucket": "blocks"}


def exposed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the samples that a worker with every tier shows on `/metrics`."""
    monkeypatch.setattr("tandem_kvbm.config.os.environ", {})
    definitions = {**KvbmSpec.build_metric_definitions({"kvbm": ALL_TIERS}), **get_connector_metric_definitions()}
    return {sample for name, metadata in definitions.items() for sample in samples(name, metadata)}


def samples(name: str, metadata: Any) -> list[str]:
    """What Prometheus' client makes of a metric's name."""
    if isinstance(metadata, OffloadingHistogramMetadata):
        return [f"{name}_{part}" for part in ("bucket", "sum", "count")]
    return [f"{name}_total"] if isinstance(metadata, OffloadingCounterMetadata) else [name]


def queried() -> list[str]:
    """Names of metrics in the queries of panels and variables."""
    queries = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in BOARD["templating"]["list"] if variable["type"] == "query"]
    return [name for query in queries for name in re.findall(r"\b(?:kvbm_|vllm:)\w+", query)]


def test_every_query_asks_for_a_metric_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters by the name that Prometheus gives them."""
    assert len(queried()) > 20
    assert set(queried()) - exposed(monkeypatch) == set()


def test_every_metric_of_dynamos_is_on_the_board() -> None:
    """A board for one is a board for the other."""
    assert {f"kvbm_{name}" for name in METRICS} <= set(queried())


def test_panels_do_not_overlap() -> None:
    """Each has a place and an id of its own."""
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in BOARD["panels"]})
