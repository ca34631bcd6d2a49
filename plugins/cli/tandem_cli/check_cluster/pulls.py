# SPDX-License-Identifier: Apache-2.0
"""Whether the cluster can pull the images: one pod with a container for each, which runs `true` and is removed again.

Only done when asked for, since it is the one check that makes something.
"""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress

from tandem_cli.check_cluster import answers
from tandem_cli.check_cluster.facts import Pull
from tandem_cli.check_cluster.kubectl import Kubectl
from tandem_protocol.errors import UnavailableError

POLL_S = 2.0
_FAILED = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
                     "RegistryUnavailable"})
_PENDING = frozenset({"", "ContainerCreating", "PodInitializing"})
_NOT_PULLED = "not pulled in time"


def try_pulls(kubectl: Kubectl, images: Sequence[str], secrets: Sequence[str], timeout_s: float,
              pause: Callable[[float], None] = time.sleep) -> tuple[Pull, ...]:
    """Each image's outcome after `timeout_s` at most. The pod is removed, whatever happens."""
    name = f"tandem-image-check-{uuid.uuid4().hex[:8]}"
    try:
        kubectl.text("create", "--filename=-", given=json.dumps(_pod(name, images, secrets)))
    except UnavailableError as exc:
        return tuple(Pull(image, f"the pod of this check could not be made: {exc}") for image in images)
    try:
        return _watch(kubectl, name, images, time.monotonic() + timeout_s, pause)
    finally:
        with suppress(UnavailableError):  # it ends by itself (activeDeadlineSeconds) and holds nothing
            kubectl.call("delete", "pod", name, "--wait=false", "--ignore-not-found")


def _watch(kubectl: Kubectl, name: str, images: Sequence[str], deadline: float, pause: Callable[[float], None]) -> tuple[Pull, ...]:
    states: dict[str, str | None] = dict.fromkeys(images)
    while time.monotonic() < deadline:
        with suppress(UnavailableError):  # the next look may succeed
            found = kubectl.decode(answers.PodItem, "get", "pod", name)
            states = {image: _outcome(found, f"image-{i}") for i, image in enumerate(images)}
        if None not in states.values():
            break
        pause(POLL_S)
    return tuple(Pull(image, _NOT_PULLED if state is None else state) for image, state in states.items())


def _outcome(pod: answers.PodItem, container: str) -> str | None:
    """Empty for a pulled image, Kubernetes' reason for one that failed, None while it is not decided.

    A container whose `true` could not be started was pulled all the same: some images have no such program.
    """
    state = next((one.state for one in pod.status.container_statuses if one.name == container), None)
    if state is None or (state.waiting is not None and state.waiting.reason in _PENDING):
        return None
    if state.waiting is not None and state.waiting.reason in _FAILED:
        return f"{state.waiting.reason}: {state.waiting.message}".rstrip(": ")
    return ""


def _pod(name: str, images: Sequence[str], secrets: Sequence[str]) -> dict[str, object]:
    small = {"cpu": "10m", "memory": "16Mi"}
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    containers = [{"name": f"image-{i}", "image": image, "command": ["true"], "securityContext": security,
                   "resources": {"requests": small, "limits": small}} for i, image in enumerate(images)]
    user = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app.kubernetes.io/component": "image-check"}},
        "spec": {"restartPolicy": "Never", "activeDeadlineSeconds": 3600, "automountServiceAccountToken": False, "securityContext": user,
                 "imagePullSecrets": [{"name": secret} for secret in secrets], "containers": containers},
    }
