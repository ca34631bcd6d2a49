# SPDX-License-Identifier: Apache-2.0
"""The Docker connector against a real Docker Engine, with containers that are no workers but run, are well and end like ones."""

import time
from pathlib import Path
from typing import Any

import docker
import pytest

from dockers import DAEMON, IMAGE, docker_engine, import_shell
from tandem_planner.connectors import Bounds
from tandem_planner.connectors.docker import DockerConnector, connect
from tandem_planner.connectors.draining import Drainer
from tandem_planner.terms import Pool
from tandem_protocol.errors import UnavailableError
from tandem_protocol.roles import Role

BOUNDS = Bounds(call_s=30, scale_s=60, check_s=0.1, drain_s=10)
ENDS_WELL = ["/bin/sh", "-c", "trap 'exit 7' TERM; while :; do sleep 1 & wait; done"]
WELL = {"test": ["CMD", "/bin/true"], "interval": 500_000_000, "timeout": 10_000_000_000, "retries": 3}


def create(client: Any, name: str, fleet: str = "tandem") -> Any:
    """A container that ends on SIGTERM, with a health check of half a second."""
    return client.containers.create(IMAGE, ENDS_WELL, name=name, network_mode="none", healthcheck=WELL,
                                    labels={"tandem.dev/fleet": fleet, "tandem.dev/role": "decode"})


@pytest.mark.slow
@pytest.mark.skipif(DAEMON is None, reason="there is no Docker Engine")
async def test_containers_of_the_fleet_are_started_and_stopped(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Up, again, down, beyond what there is; another fleet's stay; then the engine is gone."""
    folder = Path(tmp_path_factory.mktemp("docker"))
    with docker_engine(folder) as address:
        client = docker.DockerClient(base_url=address, timeout=60)
        import_shell(client)
        mine, foreign = [create(client, f"decode_{n}") for n in range(2)], create(client, "foreign", "other")
        connector = DockerConnector(connect(address, BOUNDS.call_s), "tandem", Drainer(BOUNDS.drain_s, BOUNDS.call_s), BOUNDS)
        assert await connector.pools() == {Role.DECODE: Pool(0, 0)}
        await connector.scale(Role.DECODE, 2)
        assert await connector.pools() == {Role.DECODE: Pool(2, 2)}
        begun = [_started_at(one) for one in mine]
        await connector.scale(Role.DECODE, 2)
        assert [_started_at(one) for one in mine] == begun
        with pytest.raises(UnavailableError, match="there are 2 containers"):
            await connector.scale(Role.DECODE, 3)
        stopping = time.monotonic()
        await connector.scale(Role.DECODE, 1)
        assert time.monotonic() - stopping < BOUNDS.drain_s  # by SIGTERM, not by the bound's SIGKILL
        assert [_status(one) for one in (*mine, foreign)] == [("running", 0), ("exited", 7), ("created", 0)]
        client.close()
    with pytest.raises(UnavailableError, match="the Docker Engine did not do it"):
        await connector.pools()
    await connector.close()


def _started_at(one: Any) -> str:
    one.reload()
    return str(one.attrs["State"]["StartedAt"])


def _status(one: Any) -> tuple[str, int]:
    one.reload()
    return str(one.status), int(one.attrs["State"]["ExitCode"])
