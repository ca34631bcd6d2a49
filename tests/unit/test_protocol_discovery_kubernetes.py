# SPDX-License-Identifier: Apache-2.0
"""Discovery in Kubernetes against an API server that checks schemas, rights and tokens, and misbehaves on demand: the contract and more."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kubernetes.config.config_exception import ConfigException

from discovery_contract import WAIT_S, DiscoveryContract, ids, until, worker
from kubernetes_double import NAMESPACE, Fault
from kubernetes_server import TOKEN, VERBS, KubernetesServer, make_certificates, rules
from servers import wait_for
from tandem_protocol import kubernetes_access
from tandem_protocol.discovery import Discovery, Snapshot, open_discovery
from tandem_protocol.discovery import kubernetes as module
from tandem_protocol.discovery.kubernetes import KubernetesDiscovery, KubernetesRegistration, parse_address
from tandem_protocol.discovery.kubernetes_objects import RECORD_ANNOTATION
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.workers import WorkerState

FLEET = "trial"
SHORT = f"kubernetes://{NAMESPACE}/{FLEET}?lease_s=3"
"""The shortest lease there is, for tests that see one end."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesServer]:
    """One server for the tests that leave it alone."""
    server = KubernetesServer(tmp_path_factory.mktemp("kubernetes")).begin()
    yield server
    assert server.double.leases.invalid == []
    server.end()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """One that the test may stop."""
    server = KubernetesServer(tmp_path / "kubernetes").begin()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    yield server
    assert server.double.leases.invalid == []
    server.end()


@pytest.fixture(autouse=True)
def _outside_of_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "POD_NAME", "POD_UID", "POD_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def opened(server: KubernetesServer) -> AsyncIterator[Callable[[], KubernetesDiscovery]]:
    """Opens users of the server with the shortest lease; closed at the end."""
    users: list[KubernetesDiscovery] = []

    def open_one(url: str = SHORT) -> KubernetesDiscovery:
        user = open_discovery(url)
        assert isinstance(user, KubernetesDiscovery)
        users.append(user)
        return user

    yield open_one
    for user in users:
        await user.close()


@pytest.fixture
def here(opened: Callable[[], KubernetesDiscovery]) -> KubernetesDiscovery:
    """A worker's."""
    return opened()


@pytest.fixture
def there(opened: Callable[[], KubernetesDiscovery]) -> KubernetesDiscovery:
    """A router's."""
    return opened()


def abandon(registration: object) -> None:
    """Its process dies: nobody renews the Lease, nobody removes it."""
    assert isinstance(registration, KubernetesRegistration)
    assert registration._task is not None
    registration._task.cancel()
    registration._task = None


class TestKubernetes(DiscoveryContract):
    """In a fleet of each test's own."""

    @pytest.fixture
    def url(self, shared: KubernetesServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        """A fleet of this test."""
        monkeypatch.setenv("KUBECONFIG", str(shared.kubeconfig))
        return f"kubernetes://{NAMESPACE}/{request.node.name[-60:].strip('_')}"


async def test_a_lease_says_whose_it_is(here: KubernetesDiscovery, server: KubernetesServer) -> None:
    """Who looks with kubectl sees the worker, and the fleet's labels."""
    await here.register(worker("org/name 1%"))
    (body,) = server.double.leases.objects.values()
    assert body["spec"]["holderIdentity"] == "org/name 1%"
    assert body["spec"]["leaseDurationSeconds"] == 3
    assert body["metadata"]["labels"] == {"tandem.dev/fleet": FLEET, "tandem.dev/collection": "workers",
                                          "app.kubernetes.io/managed-by": "tandem"}
    assert "ownerReferences" not in body["metadata"]


async def test_registering_takes_no_more_than_the_verbs_of_a_worker(server: KubernetesServer, here: KubernetesDiscovery) -> None:
    """Workers never list or watch."""
    server.double.rules = rules("create", "patch", "delete")
    registration = await here.register(worker())
    await registration.set_state(WorkerState.DRAINING)
    await registration.beat()  # type: ignore[attr-defined]
    await registration.close()
    assert [call.partition(" ")[0] for call in server.double.calls] == ["create", "patch", "patch", "delete"]


async def test_watching_takes_no_more_than_the_verbs_of_a_router(server: KubernetesServer, here: Discovery, there: Discovery) -> None:
    """And a planner's are fewer: it only lists."""
    await here.register(worker())
    server.double.rules = rules("list", "watch")
    async with aclosing(there.watch()) as watch:
        assert ids(await until(watch, lambda _: True)) == ["vllm-1"]
    server.double.rules = rules("list")
    assert await there.list() == (worker(),)
    server.double.rules = rules()
    with pytest.raises(UnavailableError, match=r"403 .*docs/kubernetes\.md"):
        await there.list()
    server.double.rules = rules(*VERBS)


async def test_without_the_right_to_watch_everything_is_read(server: KubernetesServer, here: Discovery, there: Discovery) -> None:
    """It stays current: what was read is true."""
    server.double.rules = rules("list", "create", "patch", "delete")
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: snapshot.current)
        await here.register(worker())
        assert (await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])).current
    assert there.counts.losses == 0


async def test_the_lease_of_a_dead_worker_ends(here: KubernetesDiscovery, there: Discovery) -> None:
    """Nobody removed it, and its neighbour lives on."""
    abandon(await here.register(worker()))
    await here.register(worker("neighbour"))
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["neighbour", "vllm-1"])
        started = time.monotonic()
        await until(watch, lambda snapshot: ids(snapshot) == ["neighbour"])
        assert time.monotonic() - started < 2 * 3
    assert len(await there.list()) == 2  # one read can't tell: it has not listened before


@pytest.mark.slow
async def test_clocks_of_pods_may_differ(server: KubernetesServer, here: KubernetesDiscovery, there: Discovery,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose clock is years behind lives on for longer than a lease; what it writes as its time is nobody's business."""
    monkeypatch.setattr("tandem_protocol.discovery.kubernetes_objects.micro_time",
                        lambda now: (now - timedelta(days=2000)).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    await here.register(worker())
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
        await until_calls(server, 0, "patch", 5)
    assert (await anext(there.watch())).records == (worker(),)
    (body,) = server.double.leases.objects.values()
    assert body["spec"]["renewTime"] < "2025"


async def until_calls(server: KubernetesServer, since: int, verb: str, count: int) -> None:
    """Waits until the server was asked so often."""
    asked = lambda: sum(call.startswith(verb) for call in server.double.calls[since:]) >= count  # noqa: E731 - a condition
    await asyncio.to_thread(wait_for, asked, WAIT_S, f"{count} times {verb}")


async def test_a_watch_goes_on_after_410_and_after_a_broken_connection(server: KubernetesServer, here: Discovery, there: Discovery) -> None:
    """Everything is read again; nothing was lost, so nothing counts as a loss."""
    await here.register(worker("a"))
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["a"])
        for number, trouble in enumerate((server.double.leases.compact, server.double.leases.break_watches)):
            calls = len(server.double.calls)
            server.do(trouble)
            await until_calls(server, calls, "list", 1)
            await here.register(worker(f"b{number}"))
            assert (await until(watch, lambda snapshot, wanted=number + 2: len(snapshot.records) == wanted)).current  # type: ignore[misc]
    assert there.counts.losses == 0


@pytest.mark.slow
async def test_an_api_server_away_for_longer_than_a_lease(server: KubernetesServer, here: Discovery, there: Discovery) -> None:
    """The view stays and says so; the records are still there when it returns, and every worker has a whole lease to renew."""
    registration = await here.register(worker())
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
        server.stop()
        await until(watch, lambda snapshot: not snapshot.current)
        await asyncio.sleep(3.5)  # the outage itself
        assert not registration.held
        await registration.set_state(WorkerState.DRAINING)
        server.start()
        views: list[Snapshot] = []

        def back(snapshot: Snapshot) -> bool:
            views.append(snapshot)
            return snapshot.current and snapshot.records == (worker(state=WorkerState.DRAINING),)

        await until(watch, back)
    assert all(ids(view) == ["vllm-1"] for view in views)
    assert registration.held
    assert (here.counts.losses, there.counts.losses) == (1, 1)


async def test_an_api_server_that_lost_everything(server: KubernetesServer, here: KubernetesDiscovery, there: Discovery) -> None:
    """Workers register again within the grace of watchers, who never miss one."""
    await here.register(worker())
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
        server.stop()
        await until(watch, lambda snapshot: not snapshot.current)
        server.do(server.double.leases.wipe)
        server.start()
        assert ids(await until(watch, lambda snapshot: snapshot.current)) == ["vllm-1"]
        await asyncio.to_thread(wait_for, lambda: here.counts.re_registrations >= 1, WAIT_S, "a registration made anew")
        assert ids(await until(there.watch(), lambda snapshot: snapshot.current)) == ["vllm-1"]
    assert here.counts.re_registrations == 1


async def test_registering_without_an_api_server_fails_in_time(server: KubernetesServer, here: Discovery) -> None:
    """The worker retries, and a watch that starts then has an empty view that is not current."""
    server.stop()
    with pytest.raises(UnavailableError, match="look at its API server, or mend TANDEM_DISCOVERY"):
        await here.register(worker())
    snapshot = await until(here.watch(), lambda _: True)
    assert (snapshot.records, snapshot.current) == ((), False)


@pytest.mark.slow
async def test_an_api_server_that_hangs_is_away_too(server: KubernetesServer, here: KubernetesDiscovery, there: Discovery) -> None:
    """Every request has its deadline."""
    await here.register(worker())
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
        server.hang()
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="does not answer"):
            await there.list()
        assert time.monotonic() - started < 8
        assert ids(await until(watch, lambda snapshot: not snapshot.current)) == ["vllm-1"]
    server.stop()


async def test_a_server_that_asks_for_a_pause_gets_it(server: KubernetesServer, here: KubernetesDiscovery, there: Discovery) -> None:
    """429 and 503 pass; the registration is not lost by them for longer than they last, nor hurried."""
    registration = await here.register(worker())
    started = time.monotonic()
    server.do(lambda: server.double.faults.extend([Fault(429, "1", verbs=("patch",)), Fault(503, verbs=("patch",))]))
    await registration.set_state(WorkerState.DRAINING)
    assert not registration.held
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: snapshot.records == (worker(state=WorkerState.DRAINING),))
    assert time.monotonic() - started > 1.0


async def test_a_lease_that_somebody_removed_is_made_anew(server: KubernetesServer, here: KubernetesDiscovery, there: Discovery) -> None:
    """By hand, or by a sweep while the worker stood still."""
    registration = await here.register(worker())
    server.do(lambda: server.double.leases._drop(next(iter(server.double.leases.objects))))
    assert await there.list() == ()
    await registration.beat()  # type: ignore[attr-defined]
    assert await there.list() == (worker(),)
    assert here.counts.re_registrations == 1


async def test_what_is_no_record_is_left_out_and_counted(server: KubernetesServer, here: KubernetesDiscovery, there: Discovery) -> None:
    """Somebody else's Lease with our labels hides no worker."""
    await here.register(worker("strange"))
    (body,) = server.double.leases.objects.values()
    server.do(lambda: body["metadata"]["annotations"].update({RECORD_ANNOTATION: "{}"}))
    await here.register(worker())
    assert await there.list() == (worker(),)
    assert await there.list() == (worker(),)
    assert there.counts.bad_records == 1


async def test_a_record_that_is_too_large_is_refused_and_the_last_one_lives_on(here: KubernetesDiscovery, there: Discovery) -> None:
    """Kubernetes takes 256 KiB; the server's own limit is never met."""
    large = worker(loras=tuple(f"adapter-{number:06}" for number in range(20_000)))
    with pytest.raises(UnavailableError, match="fewer adapters, or use etcd"):
        await here.register(large)
    registration = await here.register(worker())
    await registration.update(large)
    assert not registration.held
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda _: True)
        await registration.beat()  # type: ignore[attr-defined]
        assert await there.list() == (worker(),)


@pytest.mark.slow
async def test_the_long_dead_are_swept(server: KubernetesServer, opened: Callable[[], KubernetesDiscovery],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was restarted within its pod leaves a Lease that Kubernetes keeps; one that lives is left alone."""
    monkeypatch.setattr("tandem_protocol.discovery.sightings.SWEEP_AFTER_LEASES", 0.2)
    monkeypatch.setattr("tandem_protocol.discovery.kubernetes_leases.SERVER_WATCH_S", 1)
    here, there = opened(), opened()
    abandon(await here.register(worker("dead")))
    await here.register(worker("alive"))
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["alive", "dead"])
        await asyncio.to_thread(wait_for, lambda: len(server.double.leases.objects) == 1, WAIT_S, "the dead one's Lease to go")
    assert [body["spec"]["holderIdentity"] for body in server.double.leases.objects.values()] == ["alive"]
    assert there.counts.swept == 1


@pytest.fixture
def pod(server: KubernetesServer, monkeypatch: pytest.MonkeyPatch) -> KubernetesServer:
    """This process is a pod of the server's cluster."""
    monkeypatch.setattr(kubernetes_access, "SERVICE_ACCOUNT", server.folder)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.double.port))
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("POD_NAME", "worker-0")
    monkeypatch.setenv("POD_UID", "uid-0")
    return server


async def test_a_pods_records_go_with_it(pod: KubernetesServer, opened: Callable[..., KubernetesDiscovery]) -> None:
    """It owns them, in its own namespace; in another one it can own nothing. `kubernetes` alone says all that a pod needs."""
    here = opened("kubernetes")
    await here.register(worker())
    (body,) = pod.double.leases.objects.values()
    assert body["metadata"]["ownerReferences"] == [{"apiVersion": "v1", "kind": "Pod", "name": "worker-0", "uid": "uid-0"}]
    assert here.address == parse_address(f"//{NAMESPACE}/tandem")
    pod.do(lambda: pod.double.leases.remove_pod("uid-0"))
    assert await opened("kubernetes").list() == ()
    assert opened("kubernetes://elsewhere")._client._owner is None


async def test_a_token_that_was_rotated_is_read_again(pod: KubernetesServer, opened: Callable[..., KubernetesDiscovery]) -> None:
    """The old one is refused at once here; the next beat has the new one."""
    here = opened()
    registration = await here.register(worker())
    pod.write_token("the-second-token")
    pod.do(lambda: (pod.double.tokens.clear(), pod.double.tokens.add("the-second-token")))  # type: ignore[union-attr]
    assert TOKEN not in (pod.double.tokens or ())
    await registration.beat()  # type: ignore[attr-defined]
    assert not registration.held
    await registration.beat()  # type: ignore[attr-defined]
    assert registration.held


async def test_a_token_that_cannot_be_read_passes(pod: KubernetesServer, opened: Callable[..., KubernetesDiscovery]) -> None:
    """The kubelet may be just writing it: that is an outage like any other, and ends neither watch nor registration."""
    here = opened()

    def unreadable(_: object) -> None:
        raise ConfigException("Token file exists but empty.")

    settings = here._client._client.configuration
    before, settings.refresh_api_key_hook = settings.refresh_api_key_hook, unreadable
    with pytest.raises(UnavailableError, match=r"does not answer \(ConfigException\)"):
        await here.list()
    settings.refresh_api_key_hook = before
    assert await here.list() == ()
    assert pod.double.calls == ["list leases"]


async def test_a_server_that_the_ca_does_not_know_gets_nothing(pod: KubernetesServer, opened: Callable[..., KubernetesDiscovery],
                                                               tmp_path: Path) -> None:
    """No token goes to whoever answers in its place."""
    (tmp_path / "other").mkdir()
    make_certificates(tmp_path / "other")
    (pod.folder / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        await opened().register(worker())
    assert pod.double.calls == []


def test_without_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At the start, with the way out."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no cluster to register in: run in a pod, or set KUBECONFIG"):
        open_discovery(SHORT)


@pytest.mark.parametrize("rest", ["//Name", "//ns/fleet/of/mine", "//ns/fleet?lease_s=1", "//ns/fleet?lease_s=x", "//ns/fleet?ttl=5",
                                  "//a_b", "//ns/-x"])
def test_wrong_addresses_are_refused(rest: str) -> None:
    """With the way to write them."""
    with pytest.raises(ConfigError, match="kubernetes://namespace/fleet"):
        parse_address(rest)


async def test_a_renewal_on_the_full_second_is_taken(server: KubernetesServer, here: Discovery,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes wants a fraction in its MicroTimes."""

    class FullSecond(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5, 0, tzinfo=UTC)

    monkeypatch.setattr("tandem_protocol.discovery.kubernetes_leases.datetime", FullSecond)
    registration = await here.register(worker())
    await registration.beat()  # type: ignore[attr-defined]
    assert registration.held
    (body,) = server.double.leases.objects.values()
    assert body["spec"]["renewTime"].startswith("2026-01-02T03:04:05.000001")


def test_pauses_grow_up_to_a_bound_and_are_spread() -> None:
    """No two of a fleet come back together."""
    pauses = [[module.backoff_s(failures) for _ in range(50)] for failures in (1, 2, 30)]
    assert [(max(some) <= bound, min(some) >= bound / 2) for some, bound in zip(pauses, (0.5, 1.0, 5.0), strict=True)] == [(True, True)] * 3
    assert all(len(set(some)) > 40 for some in pauses)
