# SPDX-License-Identifier: Apache-2.0
"""What the connector needs of Kubernetes: workloads by label, and their scale. Edge module: the planner's only one that knows `kubernetes`.

Every call runs on a thread, with a deadline. What may pass (409, 429, 5xx, deadlines; `tandem_protocol.kubernetes_access`) is tried again
here, `TRIES` times. Verbs: `list` on the workloads, `get` and `update` on their scale.
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

from kubernetes import client

from tandem_planner.connectors.interface import ROLE_LABEL
from tandem_protocol import kubernetes_access as access
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.roles import Role

T = TypeVar("T")
TRIES = 6
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
"""A server that asks for a longer pause is asked again after this one; the whole change has its own bound."""
_RIGHTS = "docs/planner.md"
_LWS = ("leaderworkerset.x-k8s.io", "v1")


class WorkloadKind(StrEnum):
    """What can hold workers."""

    DEPLOYMENT = "deployment"
    STATEFUL_SET = "stateful_set"
    LEADER_WORKER_SET = "leaderworkerset"
    """Each replica is a group of pods that is one worker."""


@dataclass(frozen=True)
class Workload:
    """One object that holds the workers of a role."""

    kind: WorkloadKind
    name: str
    role: Role
    wanted: int
    ready: int
    current: bool
    """Whether the controller has seen the latest `wanted`; else `ready` may be of before."""


class KubernetesApi:
    """One namespace. Used on one event loop. Resource handling: `close` ends its connections."""

    def __init__(self, api_client: Any, namespace: str, call_s: float) -> None:
        """`api_client` as of `connect`."""
        self._client = api_client
        self._apps = client.AppsV1Api(api_client)
        self._custom = client.CustomObjectsApi(api_client)
        self._namespace = namespace
        self._call_s = call_s
        self.retries = 0
        """Calls that were tried again."""

    async def workloads(self, selector: str) -> tuple[Workload, ...]:
        """All workloads that match the label selector. Raises UnavailableError; ConfigError for a role that nobody knows."""
        found: list[Workload] = []
        for kind in (WorkloadKind.DEPLOYMENT, WorkloadKind.STATEFUL_SET):
            listed = getattr(self._apps, f"list_namespaced_{kind}")
            answer = await self._call(partial(listed, self._namespace, label_selector=selector, _request_timeout=self._call_s))
            found += [_workload(kind, self._client.sanitize_for_serialization(item)) for item in answer.items]
        return (*found, *await self._leader_worker_sets(selector))

    async def _leader_worker_sets(self, selector: str) -> tuple[Workload, ...]:
        """None where the cluster doesn't have that kind."""
        try:
            answer = await self._call(lambda: self._custom.list_namespaced_custom_object(
                *_LWS, self._namespace, "leaderworkersets", label_selector=selector, _request_timeout=self._call_s))
        except access.MissingError:
            return ()
        return tuple(_workload(WorkloadKind.LEADER_WORKER_SET, item) for item in answer["items"])

    async def set_replicas(self, workload: Workload, count: int) -> None:
        """Writes the scale as it was read: if somebody else changed it meanwhile, it is read again. Raises UnavailableError."""
        await self._call(lambda: self._replace_scale(workload, count))

    def _replace_scale(self, workload: Workload, count: int) -> None:
        """On a thread: both calls, since a conflict of the second repeats the first."""
        where: tuple[Any, ...] = (workload.name, self._namespace)
        read, replace = (getattr(self._apps, f"{verb}_namespaced_{workload.kind}_scale", None) for verb in ("read", "replace"))
        if workload.kind is WorkloadKind.LEADER_WORKER_SET:
            where = (*_LWS, self._namespace, "leaderworkersets", workload.name)
            read, replace = self._custom.get_namespaced_custom_object_scale, self._custom.replace_namespaced_custom_object_scale
        if read is None or replace is None:
            raise ConfigError(f"this client of Kubernetes knows no scale of a {workload.kind}: install the pinned version")
        scale = self._client.sanitize_for_serialization(read(*where, _request_timeout=self._call_s))
        if scale.get("spec", {}).get("replicas", 0) != count:
            scale.setdefault("spec", {})["replicas"] = count
            replace(*where, body=scale, _request_timeout=self._call_s)

    async def _call(self, call: Callable[[], T]) -> T:
        """Repeats what may pass. Raises UnavailableError with the last reason, MissingError for 404."""
        wait_s, reason = FIRST_WAIT_S, ""
        for attempt in range(TRIES):
            if attempt:
                self.retries += 1
                await asyncio.sleep(wait_s)
            try:
                return await _on_thread(call)
            except access.ApiException as exc:
                pause = access.judge(exc, 2 * wait_s, LONGEST_WAIT_S, _RIGHTS)
                wait_s, reason = pause.wait_s, pause.reason
            except access.UNREACHABLE as exc:
                wait_s, reason = min(2 * wait_s, LONGEST_WAIT_S), f"{type(exc).__name__}"
        raise UnavailableError(f"Kubernetes did not do it in {TRIES} tries: {reason}")

    async def close(self) -> None:
        """Ends its connections."""
        await asyncio.to_thread(self._client.close)


async def _on_thread(call: Callable[[], T]) -> T:
    """On a daemon thread of its own: a call that hangs up to its deadline keeps neither others nor the process's end waiting."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # a result without an error is the call's

    def run() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = (call(), None)
        except Exception as exc:  # whatever it is, whoever waits gets it
            outcome = (None, exc)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="tandem-kubernetes", daemon=True).start()
    return await future


def _workload(kind: WorkloadKind, item: dict[str, Any]) -> Workload:
    metadata, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    given = metadata.get("labels", {}).get(ROLE_LABEL, "")
    try:
        role = Role(given)
    except ValueError as exc:
        known = ", ".join(Role)
        raise ConfigError(f"{kind} {metadata['name']} has the label {ROLE_LABEL}={given!r}: use one of {known}") from exc
    wanted = int(spec.get("replicas", 1))
    current = int(status.get("observedGeneration", 0)) >= int(metadata.get("generation", 0)) or kind is WorkloadKind.LEADER_WORKER_SET
    return Workload(kind, metadata["name"], role, wanted, int(status.get("readyReplicas") or 0), current)


def connect(namespace: str, call_s: float) -> KubernetesApi:
    """The cluster that this process runs in, or else that of the kubeconfig. Raises ConfigError."""
    return KubernetesApi(access.api_client(access.load_settings("to scale in")), namespace or access.own_namespace(), call_s)
