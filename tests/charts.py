# SPDX-License-Identifier: Apache-2.0
"""Renders the Helm chart, and holds what it renders against Kubernetes' own schemas and small ones for custom resources."""

import functools
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "tandem"
HELM = Path(sysconfig.get_path("scripts")) / "helm"
"""From the package helm_binary."""
VERSIONS = ("1.29", "1.33", "1.37")
"""The oldest that the chart takes, one between, and the newest whose schemas are known."""
MODES = ("agg", "disagg", "disagg_router", "disagg_kubernetes", "disagg_planner")
RELEASE, NAMESPACE = "demo", "llm"
NAME = f"{RELEASE}-tandem"
_TIMEOUT_S = 60
Document = dict[str, Any]


def mode_file(mode: str) -> Path:
    """The values file of a mode."""
    return CHART / "modes" / f"{mode}.yaml"


@functools.cache
def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs helm; equal calls run once per process."""
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)


def template_arguments(mode: str, sets: Sequence[str]) -> list[str]:
    """Of `helm template`; each of `sets` is `key=JSON`."""
    options = [option for one in sets for option in ("--set-json", one)]
    return ["template", RELEASE, str(CHART), "--namespace", NAMESPACE, "-f", str(mode_file(mode)), *options]


def render(mode: str, *sets: str) -> list[Document]:
    """The documents of a mode with changes."""
    done = helm(*template_arguments(mode, sets))
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]


def refusal(mode: str, *sets: str) -> str:
    """What helm says to values that it refuses; fails if it takes them."""
    done = helm(*template_arguments(mode, sets))
    assert done.returncode != 0, f"the chart takes {sets}"
    return done.stderr


def find(documents: Sequence[Document], kind: str, name: str) -> Document:
    """The one document of that kind and name."""
    found = [one for one in documents if one["kind"] == kind and one["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} {kind} {name} among {[(one['kind'], one['metadata']['name']) for one in documents]}"
    return found[0]


def names(documents: Sequence[Document], kind: str) -> set[str]:
    """Names of all documents of a kind."""
    return {one["metadata"]["name"] for one in documents if one["kind"] == kind}


def pods(documents: Sequence[Document]) -> Iterator[tuple[str, Document]]:
    """Every pod and pod template, with its owner's name."""
    for one in documents:
        spec, name = one.get("spec") or {}, one["metadata"]["name"]
        if one["kind"] == "Pod":
            yield name, one
        elif one["kind"] == "LeaderWorkerSet":
            for key in ("leaderTemplate", "workerTemplate"):
                if key in spec["leaderWorkerTemplate"]:
                    yield f"{name}/{key}", spec["leaderWorkerTemplate"][key]
        elif "template" in spec and "spec" in spec["template"]:
            yield name, spec["template"]


def pod(documents: Sequence[Document], owner: str) -> Document:
    """The pod template of one owner."""
    return dict(pods(documents))[owner]


def container(template: Document, name: str) -> Document:
    """One container of a pod."""
    found: Document = next(one for one in template["spec"]["containers"] if one["name"] == name)
    return found


def environment(one: Document, pod_ip: str = "10.1.2.3") -> dict[str, str]:
    """A container's variables as a process would see them; secrets stay out."""
    values: dict[str, str] = {}
    for entry in one.get("env", []):
        if "value" in entry:
            values[entry["name"]] = expand(entry["value"], {"POD_IP": pod_ip})
        elif entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") == "status.podIP":
            values[entry["name"]] = pod_ip
    return values


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` as the kubelet expands it."""
    for name, value in variables.items():
        text = text.replace(f"$({name})", value)
    return text


def check(documents: Sequence[Document], version: str) -> list[str]:
    """What one version of Kubernetes has against the documents; also against the pods inside of custom resources."""
    wrong = [text for one in documents for text in _against(one, version)]
    for owner, template in pods([one for one in documents if one["kind"] == "LeaderWorkerSet"]):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": owner, **template["metadata"]}, "spec": template["spec"]}
        wrong += _against(as_pod, version)
    return wrong


def _against(one: Document, version: str) -> list[str]:
    where = f"{version} {one['kind']} {one['metadata']['name']}"
    try:
        if one["apiVersion"] in CUSTOM and one["kind"] in CUSTOM[one["apiVersion"]]:
            jsonschema.validate(one["spec"], CUSTOM[one["apiVersion"]][one["kind"]])
        else:
            kubernetes_validate.validate(one, version, strict=True)
    except jsonschema.ValidationError as exc:
        return [f"{where}: {'.'.join(map(str, exc.absolute_path))}: {exc.message[:300]}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{where}: this version knows no {one['apiVersion']} {one['kind']}"]
    return []


def _closed(required: Sequence[str] = (), **properties: Any) -> Document:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


_TEXT, _COUNT, _ANY = {"type": "string"}, {"type": "integer"}, {"type": "object"}
_TEMPLATE = _closed(["metadata", "spec"], metadata=_ANY, spec=_ANY)
_PARENTS = {"type": "array", "minItems": 1, "items": _closed(["name"], name=_TEXT, namespace=_TEXT)}
_HOSTS = {"type": "array", "items": _TEXT}
_BACKENDS = {"type": "array", "items": _closed(["name"], name=_TEXT, port=_COUNT, group=_TEXT, kind=_TEXT)}
CUSTOM: dict[str, dict[str, Document]] = {
    "leaderworkerset.x-k8s.io/v1": {"LeaderWorkerSet": _closed(
        ["leaderWorkerTemplate"], replicas=_COUNT, startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        leaderWorkerTemplate=_closed(["workerTemplate", "size"], size={"type": "integer", "minimum": 1},
                                     restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
                                     leaderTemplate=_TEMPLATE, workerTemplate=_TEMPLATE),
        rolloutStrategy=_closed(["type"], type={"const": "RollingUpdate"},
                                rollingUpdateConfiguration=_closed(maxSurge=_COUNT, maxUnavailable=_COUNT)),
    )},
    "monitoring.coreos.com/v1": {"PodMonitor": _closed(
        ["selector", "podMetricsEndpoints"], selector=_closed(matchLabels=_ANY, matchExpressions={"type": "array"}), podTargetLabels=_HOSTS,
        podMetricsEndpoints={"type": "array", "minItems": 1, "items": _closed(["port"], port=_TEXT, path=_TEXT, interval=_TEXT,
                                                               metricRelabelings={"type": "array"})},
    )},
    "keda.sh/v1alpha1": {"ScaledObject": _closed(
        ["scaleTargetRef", "triggers"], scaleTargetRef=_closed(["name"], apiVersion=_TEXT, kind=_TEXT, name=_TEXT), minReplicaCount=_COUNT,
        maxReplicaCount=_COUNT, cooldownPeriod=_COUNT, advanced=_ANY,
        triggers={"type": "array", "items": _closed(["type", "metadata"], type={"const": "prometheus"}, metadata=_closed(
            ["serverAddress", "query", "threshold"], serverAddress=_TEXT, query=_TEXT, threshold=_TEXT))},
    )},
    "gateway.networking.k8s.io/v1": {
        "HTTPRoute": _closed(["parentRefs", "rules"], parentRefs=_PARENTS, hostnames=_HOSTS, rules={"type": "array", "items": _closed(
            matches={"type": "array", "items": _closed(path=_closed(type={"enum": ["PathPrefix", "Exact"]}, value=_TEXT))},
            timeouts=_closed(request=_TEXT), backendRefs=_BACKENDS)}),
        "GRPCRoute": _closed(["parentRefs", "rules"], parentRefs=_PARENTS, hostnames=_HOSTS, rules={"type": "array", "items": _closed(
            matches={"type": "array", "items": _closed(method=_closed(service=_TEXT, method=_TEXT))}, backendRefs=_BACKENDS)}),
    },
    "inference.networking.k8s.io/v1": {"InferencePool": _closed(
        ["selector", "targetPorts", "endpointPickerRef"], selector=_closed(["matchLabels"], matchLabels=_ANY),
        targetPorts={"type": "array", "minItems": 1, "maxItems": 8, "items": _closed(["number"], number=_COUNT)},
        appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
        endpointPickerRef=_closed(["name"], name=_TEXT, group=_TEXT, kind=_TEXT, port=_closed(["number"], number=_COUNT),
                                  failureMode={"enum": ["FailOpen", "FailClose"]}),
    )},
}
"""Of `spec`, by apiVersion and kind; written after the projects' API references, with what the chart uses of them."""
