# SPDX-License-Identifier: Apache-2.0
"""The launcher gives all workers of a run one discovery."""

import argparse
from pathlib import Path

import pytest

from tandem_cli.serve.command_serve import _discovery
from tandem_cli.serve.layout import RunFolder
from tandem_cli.serve.options import ServeOptions, add_arguments, parse_options
from tandem_protocol.discovery import open_discovery
from tandem_protocol.discovery.file import FileDiscovery


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite must not depend on the caller's variables."""
    monkeypatch.delenv("TANDEM_DISCOVERY", raising=False)
    monkeypatch.delenv("TANDEM_GRPC_URL", raising=False)


def options(*line: str) -> ServeOptions:
    """The options of a command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args, args.passthrough = parser.parse_known_args(line)[0], []
    return parse_options(args)


def test_a_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Also where its path has signs that a URL can't carry."""
    given = _discovery(options("--grpc-port", "9001"), RunFolder(tmp_path / "a %41"))
    assert given["TANDEM_GRPC_URL"] == "127.0.0.1:9001"
    opened = open_discovery(given["TANDEM_DISCOVERY"])
    assert isinstance(opened, FileDiscovery)
    assert opened.path == tmp_path / "a %41" / "discovery"


@pytest.mark.parametrize("url", ["etcd://host:2379", ""])
def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    """Empty says: no discovery."""
    monkeypatch.setenv("TANDEM_DISCOVERY", url)
    monkeypatch.setenv("TANDEM_GRPC_URL", "me:1")
    assert _discovery(options(), RunFolder(tmp_path)) == {}


@pytest.mark.parametrize("url", ["etcd://host:2379", ""])
def test_the_flag_wins_over_all(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As every flag."""
    monkeypatch.setenv("TANDEM_DISCOVERY", "file:/elsewhere")
    assert options("--discovery", url).environment == {"TANDEM_DISCOVERY": url}
