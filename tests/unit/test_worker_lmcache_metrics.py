# SPDX-License-Identifier: Apache-2.0
"""LMCache's metrics out of the engine's processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem_worker.lmcache_metrics import lmcache_metrics

COUNTING = """
from prometheus_client import Counter, Gauge, Histogram
Counter("lmcache:num_lookup_hits", "Of lookups.", ["role"]).labels("worker").inc(%d)
Gauge("lmcache:local_cache_usage", "In bytes.", multiprocess_mode="livesum").set(5)
Histogram("lmcache:time_to_load", "In seconds.").observe(0.1)
Counter("vllm:prompt_tokens", "The stub has these.").inc()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Left by two processes, as by two ranks."""
    for count in (2, 3):
        subprocess.run([sys.executable, "-c", COUNTING % count], env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}, check=True,
                       timeout=60)
    return tmp_path


def test_lmcaches_metrics_of_all_processes_are_summed_and_no_others_taken(folder: Path) -> None:
    """The stub's own would be there twice."""
    text = lmcache_metrics(str(folder)).decode()
    assert 'lmcache:num_lookup_hits_total{role="worker"} 5.0' in text
    assert "lmcache:local_cache_usage 10.0" in text
    assert "lmcache:time_to_load_count 2.0" in text
    assert "vllm:" not in text


def test_without_a_folder_there_are_none() -> None:
    """As in a worker without LMCache."""
    assert lmcache_metrics("") == b""
