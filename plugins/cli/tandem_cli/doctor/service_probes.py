# SPDX-License-Identifier: Apache-2.0
"""Asks the services that a fleet leans on: discovery and Prometheus. Every question ends within a bound and none raises."""

import asyncio
import json
import os
import urllib.parse
import urllib.request
from pathlib import Path

from tandem_cli.doctor.facts import ServiceFacts
from tandem_protocol.discovery import open_discovery
from tandem_protocol.errors import TandemError

_TIMEOUT_S = 5.0


def probe_discovery(url: str) -> ServiceFacts:
    """Watches until the first view, as a router does; a folder must also be writable."""
    if not url:
        return ServiceFacts()
    try:
        said = _check_folder(url) or f"{asyncio.run(_count(url))} workers are registered"
    except TimeoutError:
        return ServiceFacts(url, error=f"no answer within {_TIMEOUT_S:g} s")
    except (TandemError, OSError) as exc:
        return ServiceFacts(url, error=str(exc))
    return ServiceFacts(url, says=said)


async def _count(url: str) -> int:
    discovery = open_discovery(url)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            async for snapshot in discovery.watch():
                if snapshot.current:
                    return len(snapshot.records)
    finally:
        await discovery.close()
    raise TimeoutError


def _check_folder(url: str) -> str:
    """A folder that is not there yet is made by the first worker; empty for what must be asked over the network."""
    scheme, _, path = url.partition(":")
    if scheme != "file":
        return ""
    folder = Path(urllib.parse.unquote(path))
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        raise OSError(f"{there} can't be written")
    return "" if folder.exists() else "the first worker will make the folder"


def probe_prometheus(url: str) -> ServiceFacts:
    """Whether it is ready and what it scrapes."""
    if not url:
        return ServiceFacts()
    try:
        _get(f"{url}/-/ready")
        answer = json.loads(_get(f"{url}/api/v1/query?query=up"))
        up = [float(series["value"][1]) for series in answer["data"]["result"]]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        return ServiceFacts(url, error=f"it does not answer as Prometheus does: {exc}")
    return ServiceFacts(url, says=f"{len(up)} targets, {sum(value == 1 for value in up)} up")


def _get(url: str) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise ValueError("give http://host:port")
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - the scheme was looked at
        return bytes(answer.read())
