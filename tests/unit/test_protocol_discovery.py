# SPDX-License-Identifier: Apache-2.0
"""Discovery in memory and in a folder; the contract's tests are inherited."""

import uuid
from pathlib import Path

import pytest

from discovery_contract import DiscoveryContract
from tandem_protocol.discovery import check_url, open_discovery
from tandem_protocol.discovery.file import FileDiscovery
from tandem_protocol.discovery.memory import MemoryDiscovery
from tandem_protocol.errors import ConfigError


class TestMemory(DiscoveryContract):
    """The baseline."""

    @pytest.fixture
    def url(self) -> str:
        """A store of this test."""
        return f"memory:{uuid.uuid4().hex}"


class TestFile(DiscoveryContract):
    """A folder that does not exist yet."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        """A folder of this test."""
        return f"file:{tmp_path / 'run' / 'discovery'}"


@pytest.mark.parametrize("url", ["", "memory:", "file:/a/b", "etcd://host:2379/prefix", "kubernetes", "kubernetes://namespace/fleet"])
def test_known_urls_pass(url: str) -> None:
    """Empty means none."""
    assert check_url(url) == url


@pytest.mark.parametrize("url", ["memory", "http://x", "/a/folder", "etcd3://host"])
def test_unknown_urls_are_refused(url: str) -> None:
    """The message lists what there is."""
    with pytest.raises(ConfigError, match="expected file:/folder, etcd://"):
        open_discovery(url)


@pytest.mark.parametrize(("url", "message"), [("", "TANDEM_DISCOVERY"), ("file:a/b", "file:/folder"), ("file:", "file:/folder")])
def test_incomplete_urls_are_refused(url: str, message: str) -> None:
    """With the way to write them."""
    with pytest.raises(ConfigError, match=message):
        open_discovery(url)


def test_the_scheme_chooses_the_store() -> None:
    """Nothing is touched by opening."""
    assert isinstance(open_discovery("memory:"), MemoryDiscovery)
    assert isinstance(open_discovery("file:///nowhere/at/all"), FileDiscovery)
