# SPDX-License-Identifier: Apache-2.0
"""An API server for tests: Leases (`lease_double`), workloads and their scale, checked against Kubernetes' own schemas and a Role's rules.

It records every verb, refuses what the rules don't allow and, if told so, tokens that it doesn't know, detects conflicts by resource
version, and on demand answers with errors or not at all. Its controllers move one replica with each list. LeaderWorkerSets have no schema
in `kubernetes_validate`; theirs are not checked.
"""

import asyncio
import functools
import json
import re
import ssl
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import kubernetes_validate
from aiohttp import web

from lease_double import SCHEMAS, LeaseStore, status

NAMESPACE = "llm"
_LWS_GROUP = "leaderworkerset.x-k8s.io"
_KINDS = {"deployments": ("apps/v1", "Deployment"), "statefulsets": ("apps/v1", "StatefulSet"),
          "leaderworkersets": (f"{_LWS_GROUP}/v1", "LeaderWorkerSet")}  # fmt: skip


@dataclass
class Object:
    """One workload."""

    resource: str
    name: str
    labels: dict[str, str]
    replicas: int
    ready: int
    generation: int = 1
    observed: int = 1
    version: int = 100
    moves: bool = True
    """Whether its controller does anything."""

    def set_replicas(self, count: int) -> None:
        """As anybody's update."""
        self.replicas, self.generation, self.version = count, self.generation + 1, self.version + 1

    def move(self) -> None:
        """One round of the controller."""
        if self.moves:
            self.observed = self.generation
            self.ready += (self.replicas > self.ready) - (self.replicas < self.ready)

    def body(self) -> dict[str, Any]:
        """The object, checked."""
        version, kind = _KINDS[self.resource]
        pod = {"metadata": {"labels": self.labels}, "spec": {"containers": [{"name": "worker", "image": "tandem"}]}}
        spec: dict[str, Any] = {"replicas": self.replicas, "selector": {"matchLabels": self.labels}, "template": pod}
        spec |= {"serviceName": self.name} if kind == "StatefulSet" else {}
        status = {"observedGeneration": self.observed, "replicas": self.replicas, **({"readyReplicas": self.ready} if self.ready else {})}
        metadata = {"name": self.name, "namespace": NAMESPACE, "labels": self.labels, "generation": self.generation,
                    "resourceVersion": str(self.version)}
        return checked({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec, "status": status})

    def scale(self) -> dict[str, Any]:
        """Its scale subresource, checked."""
        metadata = {"name": self.name, "namespace": NAMESPACE, "resourceVersion": str(self.version)}
        return checked({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": metadata, "spec": {"replicas": self.replicas},
                        "status": {"replicas": self.replicas, "selector": "tandem.dev/role"}})


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """The body, if Kubernetes' schema of its kind allows it. Raises kubernetes_validate.ValidationError."""
    if _LWS_GROUP not in body["apiVersion"]:
        _validate(re.sub(r"\d+", "1", json.dumps(body)))
    return body


@functools.cache
def _validate(body: str) -> None:
    """A check takes a tenth of a second: bodies that differ in numbers alone are checked once."""
    kubernetes_validate.validate(json.loads(body), SCHEMAS, strict=True)


@dataclass
class Fault:
    """How one request is answered instead."""

    status: int = 0
    """0: not at all."""
    retry_after: str = ""
    verbs: tuple[str, ...] = ("list", "get", "update")
    times: int = 1


@dataclass
class KubernetesDouble:
    """One API server."""

    rules: list[dict[str, list[str]]]
    """Of a Role."""
    objects: list[Object] = field(default_factory=list)
    faults: deque[Fault] = field(default_factory=deque)
    calls: list[str] = field(default_factory=list)
    """`verb resource` in order, also of those that were refused."""
    invalid: list[str] = field(default_factory=list)
    """Bodies that the schema refused."""
    has_lws: bool = False
    rival: int | None = None
    """Somebody else scales to this between the next read and write."""
    leases: LeaseStore = field(default_factory=lambda: LeaseStore(NAMESPACE))
    tokens: set[str] | None = None
    """Others get a 401; None: nobody needs one."""
    port: int = 0
    """0: any, which is kept from then on."""
    tls: ssl.SSLContext | None = None
    _never: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listens; returns the URL."""
        app = web.Application()
        app.router.add_route("*", f"/apis/{{group}}/{{version}}/namespaces/{NAMESPACE}/{{resource}}{{rest:.*}}", self._answer)
        self._never = asyncio.Event()
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.tls, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """Ends, with what hangs; `start` goes on with what is stored."""
        self._never.set()
        self.leases.break_watches()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        group, resource, rest = (request.match_info[name] for name in ("group", "resource", "rest"))
        name, _, sub = rest.strip("/").partition("/")
        look = "get" if name else "watch" if request.query.get("watch") == "true" else "list"
        verb = {"GET": look, "PUT": "update", "PATCH": "patch", "POST": "create", "DELETE": "delete"}[request.method]
        what = f"{resource}/{sub}" if sub else resource
        self.calls.append(f"{verb} {what}")
        if self.faults and verb in self.faults[0].verbs:
            fault = self.faults[0]
            fault.times -= 1
            if fault.times <= 0:
                self.faults.popleft()
            if not fault.status:
                await self._never.wait()
            return _status(fault.status, "as the test wants it", {"Retry-After": fault.retry_after} if fault.retry_after else {})
        if self.tokens is not None and request.headers.get("Authorization", "").lower().removeprefix("bearer ") not in self.tokens:
            return _status(401, "Unauthorized")
        if not any(group in rule["apiGroups"] and what in rule["resources"] and verb in rule["verbs"] for rule in self.rules):
            return _status(403, f"the role does not allow {verb} {what}")
        if resource == "leaderworkersets" and not self.has_lws:
            return _status(404, "the server could not find the requested resource")
        if resource == "leases":
            return await self.leases.answer(request, name)
        if verb == "list":
            return self._list(resource, request.query.get("labelSelector", ""))
        return await self._scale(request, next(one for one in self.objects if (one.resource, one.name) == (resource, name)))

    def _list(self, resource: str, selector: str) -> web.Response:
        version, kind = _KINDS[resource]
        found = list(self._selected(resource, selector))
        for one in found:
            one.move()
        items = [one.body() for one in found]
        return web.json_response({"apiVersion": version, "kind": f"{kind}List", "metadata": {"resourceVersion": "1"}, "items": items})

    def _selected(self, resource: str, selector: str) -> Iterator[Object]:
        terms = [term.partition("=") for term in selector.split(",") if term]
        for one in self.objects:
            fits = all(key in one.labels and (not equals or one.labels[key] == value) for key, equals, value in terms)
            if one.resource == resource and fits:
                yield one

    async def _scale(self, request: web.Request, one: Object) -> web.Response:
        if request.method == "GET":
            answer = web.json_response(one.scale())
            if self.rival is not None:
                one.set_replicas(self.rival)
                self.rival = None
            return answer
        body = await request.json()
        try:
            checked(body)
        except kubernetes_validate.ValidationError as exc:
            self.invalid.append(str(exc))
            return _status(422, "invalid")
        if body["metadata"].get("resourceVersion") != str(one.version):
            return _status(409, "the object has been modified")
        one.set_replicas(body["spec"].get("replicas", 0))
        return web.json_response(one.scale())


def _status(code: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(status(code, message), status=code, headers=headers)
