# SPDX-License-Identifier: Apache-2.0
"""The object store over a bucket in memory: the contract of every store, within a second. Real endpoints are integration tests."""

import pytest

pytest.importorskip("boto3")

import store_contract
from s3_memory import MemoryS3, memory_s3  # noqa: F401 - a fixture
from store_contract import EvictingContract, Make
from tandem_kvbm.objects.config import MIB, ObjectConfig
from tandem_kvbm.objects.store import ObjectStore


class TestObjects(EvictingContract):
    """Alone in its bucket."""

    @pytest.fixture(params=["in one piece", "in parts"])
    def make(self, memory_s3: MemoryS3, request: pytest.FixtureRequest) -> Make:  # noqa: F811
        """A store of CAPACITY blocks."""
        limit = 16 * MIB if "one" in request.param else 1
        config = ObjectConfig(bucket="bucket", num_blocks=store_contract.CAPACITY, multipart_bytes=limit, access_key="a", secret_key="b")
        return lambda: ObjectStore(config, "model", b"layout", store_contract.BLOCK_BYTES)
