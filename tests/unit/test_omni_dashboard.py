# SPDX-License-Identifier: Apache-2.0
"""The Grafana board of omni workers; whether its metrics are there is asked of real ones (tests/integration/test_omni_requests.py)."""

import json
from pathlib import Path

BOARD = json.loads((Path(__file__).parents[2] / "dashboards" / "omni.json").read_text())


def test_panels_do_not_overlap() -> None:
    """Each has a place and an id of its own."""
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in BOARD["panels"]})


def test_what_tritons_port_shows_again_is_not_counted_twice() -> None:
    """Its series have the label `triton_instance`."""
    queries = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    assert len(queries) > 20
    assert all(query.count("{") == query.count('{triton_instance=""') for query in queries)
