# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes connector against an API server that checks schemas and rights, and misbehaves on demand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from kubernetes_double import NAMESPACE, Fault, KubernetesDouble, Object
from tandem_planner.connectors import Bounds
from tandem_planner.connectors import kubernetes_api as api
from tandem_planner.connectors.kubernetes import KubernetesConnector
from tandem_planner.connectors.kubernetes_api import KubernetesApi
from tandem_planner.terms import Pool
from tandem_protocol import kubernetes_access
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.roles import Role

ROOT = Path(__file__).parents[2]
BOUNDS = Bounds(call_s=2, scale_s=10, check_s=0.01, drain_s=0)
WAIT_S = 30.0


def documented_rules() -> list[dict[str, list[str]]]:
    """Of the Role that docs/planner.md shows."""
    text = (ROOT / "docs" / "planner.md").read_text()
    role: Any = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    return list(role["rules"])


def workload(name: str, role: str, replicas: int = 1, resource: str = "deployments", fleet: str = "tandem") -> Object:
    """A settled one."""
    return Object(resource, name, {"tandem.dev/fleet": fleet, "tandem.dev/role": role}, replicas, replicas)


@asynccontextmanager
async def cluster(*objects: Object, bounds: Bounds = BOUNDS, **fields: Any) -> AsyncIterator[tuple[KubernetesDouble, KubernetesConnector]]:
    """A double and a connector to it."""
    double = KubernetesDouble(documented_rules(), list(objects), **fields)
    settings = client.Configuration(host=await double.start())
    settings.proxy = None
    connector = KubernetesConnector(KubernetesApi(kubernetes_access.api_client(settings), NAMESPACE, bounds.call_s), "tandem", bounds)
    try:
        async with asyncio.timeout(WAIT_S):
            yield double, connector
    finally:
        await connector.close()
        await double.stop()
        assert double.invalid == []


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are short here; that they are obeyed is tested by itself."""
    monkeypatch.setattr(api, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(api, "LONGEST_WAIT_S", 0.01)


async def test_every_kind_of_workload_is_scaled_with_no_more_than_the_documented_rights() -> None:
    """And every documented right is used."""
    objects = [workload("p", "prefill"), workload("d", "decode", 2, "statefulsets"), workload("a", "aggregated", 0, "leaderworkersets"),
               workload("foreign", "prefill", 7, fleet="other")]  # fmt: skip
    async with cluster(*objects, has_lws=True) as (double, connector):
        assert await connector.pools() == {Role.PREFILL: Pool(1, 1), Role.DECODE: Pool(2, 2), Role.AGGREGATED: Pool(0, 0)}
        for role, count in ((Role.PREFILL, 3), (Role.DECODE, 1), (Role.AGGREGATED, 2)):
            await connector.scale(role, count)
        assert [one.replicas for one in objects] == [3, 1, 2, 7]
        assert await connector.pools() == {Role.PREFILL: Pool(3, 3), Role.DECODE: Pool(1, 1), Role.AGGREGATED: Pool(2, 2)}
        used = {(verb, what) for verb, _, what in (call.partition(" ") for call in double.calls)}
        assert used == {(verb, what) for rule in documented_rules() for what in rule["resources"] for verb in rule["verbs"]}


async def test_scale_waits_until_the_new_workers_are_ready_and_repeats_nothing() -> None:
    async with cluster(workload("d", "decode")) as (double, connector):
        double.objects[0].moves = False
        scaling = asyncio.create_task(connector.scale(Role.DECODE, 3))
        while (await connector.pools())[Role.DECODE] == Pool(1, 1):
            pass
        assert (await connector.pools())[Role.DECODE] == Pool(ready=1, wanted=3)
        assert not scaling.done()
        double.objects[0].moves = True
        await scaling
        double.calls.clear()
        await connector.scale(Role.DECODE, 3)
        assert not [call for call in double.calls if call.startswith("update")]


async def test_a_change_that_no_controller_has_seen_is_not_settled() -> None:
    """Its ready count is of before, and could fit by accident."""
    async with cluster(workload("d", "decode", 2)) as (double, connector):
        double.objects[0].moves = False
        double.objects[0].set_replicas(2)
        assert not (await connector.pools())[Role.DECODE].settled


async def test_conflicts_throttling_and_errors_pass() -> None:
    """429 with Retry-After, 500, 409: each is tried again, the conflict with what was read anew."""
    async with cluster(workload("d", "decode")) as (double, connector):
        double.faults.extend([Fault(429, "1"), Fault(500), Fault(409, verbs=("update",))])
        await connector.scale(Role.DECODE, 2)
        assert double.objects[0].replicas == 2
        assert double.calls.count("update deployments/scale") == 2  # the 409, and the one that held
        assert double.calls.count("get deployments/scale") == 2


async def test_what_somebody_else_changed_meanwhile_is_read_again() -> None:
    """The double refuses a scale of an older version by itself."""
    async with cluster(workload("d", "decode")) as (double, connector):
        double.rival = 5
        await connector.scale(Role.DECODE, 2)
        assert (double.objects[0].replicas, double.objects[0].version) == (2, 102)
        assert double.calls.count("update deployments/scale") == 2


async def test_a_retry_after_is_obeyed_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server can't make the planner wait for an hour."""
    waited: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(api, "LONGEST_WAIT_S", 10.0)
    monkeypatch.setattr(api.asyncio, "sleep", sleep)
    async with cluster(workload("d", "decode")) as (double, connector):
        double.faults.extend([Fault(429, "3"), Fault(429, "3600"), Fault(503)])
        await connector.pools()
        assert waited[:3] == [3.0, 10.0, 10.0]


async def test_a_call_that_is_not_answered_is_given_up_and_tried_again() -> None:
    async with cluster(workload("d", "decode"), bounds=Bounds(0.2, 10, 0.01, 0)) as (double, connector):
        double.faults.append(Fault(0))
        assert await connector.pools() == {Role.DECODE: Pool(1, 1)}
        assert double.calls.count("list deployments") == 2


async def test_what_does_not_pass_becomes_a_sentence_after_so_many_tries() -> None:
    async with cluster(workload("d", "decode")) as (double, connector):
        double.faults.extend([Fault(429)] * api.TRIES)
        with pytest.raises(UnavailableError, match=f"in {api.TRIES} tries: 429"):
            await connector.pools()
        assert double.calls == ["list deployments"] * api.TRIES
        double.rules.clear()
        with pytest.raises(UnavailableError, match=r"403 .*docs/planner\.md"):
            await connector.pools()


async def test_workers_that_do_not_become_ready_are_not_waited_for_for_ever() -> None:
    """The scale stays: Kubernetes may find room later."""
    async with cluster(workload("d", "decode"), bounds=Bounds(2, 0.3, 0.01, 0)) as (double, connector):
        double.objects[0].moves = False
        with pytest.raises(UnavailableError, match="not within 0.3 s: 2 ready decode workers in deployment d"):  # noqa: RUF043 - a sentence
            await connector.scale(Role.DECODE, 2)
        assert double.objects[0].replicas == 2


async def test_labels_that_do_not_say_who_is_meant_are_refused() -> None:
    async with cluster(workload("d", "decode"), workload("e", "decode", resource="statefulsets")) as (_, connector):
        with pytest.raises(ConfigError, match="deployment d and stateful_set e both have"):
            await connector.pools()
    async with cluster(workload("x", "encoder")) as (_, connector):
        with pytest.raises(ConfigError, match="deployment x has the label"):
            await connector.pools()
    async with cluster(workload("d", "decode")) as (_, connector):
        with pytest.raises(ConfigError, match="label the one that holds the prefill workers"):
            await connector.scale(Role.PREFILL, 1)


async def test_a_change_can_be_cancelled() -> None:
    """It leaves Kubernetes with what was written."""
    async with cluster(workload("d", "decode")) as (double, connector):
        double.objects[0].moves = False
        scaling = asyncio.create_task(connector.scale(Role.DECODE, 4))
        while double.objects[0].replicas != 4:  # noqa: ASYNC110 - the double has no event
            await asyncio.sleep(0)
        scaling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scaling


def test_without_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr(kubernetes_access.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="set KUBECONFIG"):
        api.connect("", 1)
