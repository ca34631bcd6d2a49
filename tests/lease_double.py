# SPDX-License-Identifier: Apache-2.0
"""Leases as an API server keeps them, for `kubernetes_double`: versions, watches with bookmarks and 410, preconditions, limits, owners.

Written after Kubernetes' API concepts and its validation of Leases; every stored object is checked against Kubernetes' own schema. A watch
sends each event in two pieces, since nothing promises that a line arrives in one.
"""

import asyncio
import copy
import functools
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import kubernetes_validate
from aiohttp import web

SCHEMAS = kubernetes_validate.latest_version()
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")
_ANNOTATIONS_BYTES = 256 * 1024
Body = dict[str, Any]
_VERSION = "coordination.k8s.io/v1"


class Refusal(Exception):
    """An answer other than 2xx."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Event:
    """One entry of the history that watches read."""

    version: int
    kind: str
    body: Body


@dataclass
class LeaseStore:
    """All Leases of one namespace. Used on one event loop; `objects` may be read from anywhere."""

    namespace: str
    objects: dict[str, Body] = field(default_factory=dict)
    version: int = 1000
    history: list[Event] = field(default_factory=list)
    compacted: int = 0
    """Watches can't begin before this version."""
    watches: int = 0
    """Open now."""
    invalid: list[str] = field(default_factory=list)
    """What Kubernetes' schema had against a body."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _generation: int = 0

    async def answer(self, request: web.Request, name: str) -> web.StreamResponse:
        """One request that the Role allows."""
        try:
            if request.method == "GET":
                return await self._watch(request) if request.query.get("watch") == "true" else web.json_response(self._list(request))
            if request.method == "DELETE":
                return web.json_response(self._delete(name, await _json(request)))
            if request.method == "POST":
                return web.json_response(self._create(await _json(request)), status=201)
            return web.json_response(self._patch(name, request.content_type, await _json(request)))
        except Refusal as exc:
            return web.json_response(status(exc.code, str(exc)), status=exc.code)

    # --- what tests do to it ---

    def compact(self) -> None:
        """Forgets the history: a watch from any earlier version is answered with 410."""
        self.version += 1
        self.compacted = self.version
        self.history.clear()
        self._wake()

    def break_watches(self) -> None:
        """Every open watch ends in the middle of its stream."""
        self._generation += 1
        self._wake()

    def remove_pod(self, uid: str) -> None:
        """What the garbage collector does when a pod is gone."""
        for name, body in list(self.objects.items()):
            if any(owner["uid"] == uid for owner in body["metadata"].get("ownerReferences", [])):
                self._drop(name)

    def wipe(self) -> None:
        """Another store, as after etcd was lost: nothing in it, and versions begin anew."""
        self.objects.clear()
        self.history.clear()
        self.version = self.compacted = 1

    # --- verbs ---

    def _list(self, request: web.Request) -> Body:
        items = list(_selected(self.objects.values(), request.query.get("labelSelector", "")))
        return {"apiVersion": _VERSION, "kind": "LeaseList", "metadata": {"resourceVersion": str(self.version)}, "items": items}

    def _create(self, body: Body) -> Body:
        name = body["metadata"].get("name", "")
        if name in self.objects:
            raise Refusal(409, f'leases.coordination.k8s.io "{name}" already exists')
        made = copy.deepcopy(body)
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        made["metadata"] |= {"namespace": self.namespace, "uid": str(uuid.uuid4()), "creationTimestamp": created}
        return self._store("ADDED", made)

    def _patch(self, name: str, content_type: str, patch: Body) -> Body:
        if content_type != "application/merge-patch+json":
            raise Refusal(415, f"this double takes merge patches only, not {content_type}")
        old = self._get(name)
        _check_preconditions(old, patch.get("metadata", {}))
        new = _merged(old, patch)
        new["metadata"] |= {key: old["metadata"][key] for key in ("name", "namespace", "uid", "creationTimestamp", "resourceVersion")}
        return old if new == old else self._store("MODIFIED", new)

    def _delete(self, name: str, options: Body) -> Body:
        _check_preconditions(self._get(name), options.get("preconditions", {}))
        self._drop(name)
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}

    def _get(self, name: str) -> Body:
        if name not in self.objects:
            raise Refusal(404, f'leases.coordination.k8s.io "{name}" not found')
        return self.objects[name]

    def _drop(self, name: str) -> None:
        self._note("DELETED", self.objects.pop(name))

    def _store(self, kind: str, body: Body) -> Body:
        if wrong := next(_objections(body), ""):
            self.invalid.append(wrong)
            raise Refusal(422, f"Lease is invalid: {wrong}")
        self.objects[body["metadata"]["name"]] = body
        self._note(kind, body)
        return body

    def _note(self, kind: str, body: Body) -> None:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.history.append(Event(self.version, kind, copy.deepcopy(body)))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        self.watches += 1
        try:
            async with asyncio.timeout(int(request.query.get("timeoutSeconds", "3600"))):
                await self._follow(request, answer)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.watches -= 1
        return answer

    async def _follow(self, request: web.Request, answer: web.StreamResponse) -> None:
        seen, selector, generation = int(request.query["resourceVersion"]), request.query.get("labelSelector", ""), self._generation
        if request.query.get("allowWatchBookmarks") == "true":
            await _send(answer, "BOOKMARK", {"kind": "Lease", "apiVersion": _VERSION, "metadata": {"resourceVersion": str(seen)}})
        while generation == self._generation:
            changed = self._changed
            if seen < self.compacted:
                await _send(answer, "ERROR", status(410, f"too old resource version: {seen} ({self.compacted})"))
                return
            for event in [event for event in self.history if event.version > seen]:
                seen = event.version
                if list(_selected([event.body], selector)):
                    await _send(answer, event.kind, event.body)
            await changed.wait()
        if request.transport is not None:
            request.transport.abort()


async def _json(request: web.Request) -> Body:
    text = await request.text()
    body: Body = json.loads(text) if text else {}
    return body


async def _send(answer: web.StreamResponse, kind: str, body: Body) -> None:
    line = json.dumps({"type": kind, "object": body}).encode() + b"\n"
    await answer.write(line[: len(line) // 2])
    await answer.write(line[len(line) // 2 :])


def _selected(items: Any, selector: str) -> Iterator[Body]:
    terms = [term.split("=") for term in selector.split(",") if term]
    for body in items:
        if all(body["metadata"].get("labels", {}).get(key) == value for key, value in terms):
            yield body


def _merged(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    new = copy.deepcopy(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = _merged(new.get(key), value)
    return new


def _check_preconditions(body: Body, wanted: Body) -> None:
    for key in ("uid", "resourceVersion"):
        if wanted.get(key) not in (None, body["metadata"][key]):
            raise Refusal(409, f"the {key} in the precondition ({wanted[key]}) does not match that of the object ({body['metadata'][key]})")


def _objections(body: Body) -> Iterator[str]:
    """What Kubernetes' validation says beyond the schema, then the schema."""
    metadata, spec = body["metadata"], body["spec"]
    if not _NAME.fullmatch(metadata["name"]) or len(metadata["name"]) > 253:
        yield f"metadata.name: {metadata['name']!r} is no DNS subdomain"
    for key, value in metadata.get("labels", {}).items():
        if not _LABEL.fullmatch(value) or len(value) > 63:
            yield f"metadata.labels: {key}={value!r} is no label value"
    if sum(len(key) + len(value.encode()) for key, value in metadata.get("annotations", {}).items()) > _ANNOTATIONS_BYTES:
        yield "metadata.annotations: Too long: may not be more than 262144 bytes"
    if spec.get("leaseDurationSeconds", 1) <= 0:
        yield "spec.leaseDurationSeconds: must be greater than 0"
    for key in ("acquireTime", "renewTime"):
        if not _MICRO_TIME.fullmatch(spec.get(key, "2026-01-01T00:00:00.000000Z")):
            yield f"spec.{key}: {spec[key]!r} is no MicroTime"
    yield from _schema_objections(_shape(body))


def _shape(body: Body) -> str:
    """What differs from object to object, made equal: a check against the schema takes a tenth of a second."""
    shaped = copy.deepcopy(body)
    shaped["metadata"] |= {"annotations": dict.fromkeys(shaped["metadata"].get("annotations", {}), ""), "name": "x", "uid": "x",
                           "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    times = {"acquireTime", "renewTime"} & shaped["spec"].keys()
    shaped["spec"] |= {"holderIdentity": "x"} | dict.fromkeys(times, "2026-01-01T00:00:00.000000Z")
    return json.dumps(shaped, sort_keys=True)


@functools.cache
def _schema_objections(shape: str) -> tuple[str, ...]:
    try:
        kubernetes_validate.validate(json.loads(shape), SCHEMAS, strict=True)
    except kubernetes_validate.ValidationError as exc:
        return (str(exc),)
    return ()


def status(code: int, message: str) -> Body:
    """What Kubernetes answers in place of an object."""
    return {"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "message": message, "code": code}
