# SPDX-License-Identifier: Apache-2.0
"""vLLM's contract for offloading managers, over a tier with each of our stores."""

from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("boto3")

from manager_contract import ManagerContract
from s3_memory import MemoryS3, memory_s3  # noqa: F401 - a fixture
from store_contract import BLOCK_BYTES, CAPACITY, Make
from tandem_kvbm.disk.files import PAGE
from tandem_kvbm.disk.options import DiskOptions
from tandem_kvbm.disk.store import DiskStore
from tandem_kvbm.layout import Layout
from tandem_kvbm.memory_store import MemoryStore
from tandem_kvbm.objects.config import ObjectConfig
from tandem_kvbm.objects.store import ObjectStore

LAYOUT = Layout(model="m", weights="w", dtype="float32", block_bytes=BLOCK_BYTES, tokens_per_hash=32, blocks_per_chunk=1,
                groups=((32, ("layer",)),), parallel=(1, 1, 1, 1, 1), kv_cache_layout="NHD", canonical=False, replicated=False,
                engine="vllm 0", namespace="")


class TestMemory(ManagerContract):
    @pytest.fixture
    def make(self) -> Make:
        return lambda: MemoryStore(CAPACITY, BLOCK_BYTES)


class TestDisk(ManagerContract):
    @pytest.fixture(params=[False, True], ids=["own folder", "shared folder"])
    def make(self, tmp_path: Path, request: pytest.FixtureRequest) -> Make:
        options = DiskOptions(str(tmp_path), CAPACITY * (BLOCK_BYTES + PAGE), shared=request.param)
        return lambda: DiskStore(options, LAYOUT)


class TestObjects(ManagerContract):
    @pytest.fixture
    def make(self, memory_s3: MemoryS3) -> Make:  # noqa: F811
        config = ObjectConfig(bucket="bucket", num_blocks=CAPACITY, access_key="a", secret_key="b", absent_ttl_s=0.0)
        return lambda: ObjectStore(config, "model", b"layout", BLOCK_BYTES)
