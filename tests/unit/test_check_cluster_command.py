# SPDX-License-Identifier: Apache-2.0
"""`tandem check-cluster` with a kubectl that plays recorded answers: what it asks, its report, its exit code, its deadlines."""

import json
import time
from pathlib import Path

import pytest
import yaml

from charts import CHART, HELM, mode_file
from kubectls import Answer, FakeKubectl, install
from tandem_cli.check_cluster.kubectl import Kubectl
from tandem_cli.check_cluster.pulls import try_pulls
from tandem_cli.check_cluster.rendering import Chosen, render
from tandem_cli.main import main
from tandem_protocol.errors import ConfigError, UnavailableError


def listing(*items: object) -> str:
    """A list as kubectl prints it."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def node(name: str, gpus: int) -> object:
    """A Node with what is looked at, and more."""
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"nvidia.com/gpu.present": "true"}, "uid": "1"},
            "spec": {"podCIDR": "10.0.0.0/24"},
            "status": {"allocatable": {"cpu": "63500m", "memory": "263924Mi", "nvidia.com/gpu": str(gpus)}}}


CLIENT = Answer("version --client", json.dumps({"clientVersion": {"gitVersion": "v1.33.1"}, "kustomizeVersion": "v5.6.0"}))
SERVER = Answer("version", json.dumps({"clientVersion": {"gitVersion": "v1.33.1"}, "serverVersion": {"gitVersion": "v1.32.5-gke.1"}}))
CLASSES = Answer("get storageclasses", listing(
    {"metadata": {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}, "provisioner": "x"}))
NODES = Answer("get nodes", listing(node("a", 8), node("b", 8)))
OPERATOR = Answer("get pods --all-namespaces", listing({"metadata": {"name": "gpu-operator-7d"}, "status": {"phase": "Running"}}))
QUOTAS = Answer("get resourcequotas", listing({"metadata": {"name": "team"}, "status": {"hard": {"pods": "20"}, "used": {"pods": "3"}}}))
NAMESPACE = Answer("get namespace", "namespace/llm\n")
PODMONITORS = Answer("get --raw /apis/monitoring.coreos.com/v1",
                     json.dumps({"kind": "APIResourceList", "resources": [{"kind": "PodMonitor"}]}))
DRY_RUN = Answer("apply --dry-run=server", "deployment.apps/x serverside-applied (server dry run)\n")
GOOD = (CLIENT, SERVER, CLASSES, NODES, OPERATOR, QUOTAS, NAMESPACE, PODMONITORS, DRY_RUN)


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    """With a good cluster behind it; helm is on the PATH, too."""
    fake = install(tmp_path / "bin", monkeypatch)
    (fake.folder / "helm").symlink_to(HELM)
    fake.play(*GOOD)
    return fake


def check(*options: str, mode: str = "disagg_planner") -> int:
    """Runs the command for a mode."""
    return main(["check-cluster", "--namespace", "llm", "--chart", str(CHART), "-f", str(mode_file(mode)), *options])


def verdicts(said: str) -> dict[str, str]:
    """Of the JSON report."""
    return {row["check"]: row["verdict"] for row in json.loads(said)["checks"]}


def test_a_good_cluster(kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 and a line for each check; every call has a deadline and the namespace; nothing is made."""
    assert check() == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said
    assert "2 nvidia.com/gpu asked for, 16 on the nodes" in said
    for arguments, _ in kubectl.calls():
        assert arguments[0].startswith("--request-timeout=")
        assert "--namespace=llm" in arguments
        assert not {"create", "delete"} & set(arguments)
        assert "apply" not in arguments or "--dry-run=server" in arguments


def test_the_dry_run_gets_what_would_be_installed(kubectl: FakeKubectl) -> None:
    """All documents, but for the pod of `helm test`."""
    assert check("--set", "router.replicas=3", "--release", "mine") == 0
    given = next(text for arguments, text in kubectl.calls() if "apply" in arguments)
    documents = list(yaml.safe_load_all(given))
    routers = [one for one in documents if one["kind"] == "Deployment" and one["metadata"]["name"] == "mine-tandem-router"]
    assert [one["spec"]["replicas"] for one in routers] == [3]
    assert "Pod" not in {one["kind"] for one in documents}


def test_the_report_as_json(kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]) -> None:
    """With verdicts and fixes; a failure makes the exit code 1."""
    kubectl.play(CLIENT, SERVER, CLASSES, Answer("get nodes", listing(node("a", 1))), OPERATOR, QUOTAS, NAMESPACE, DRY_RUN)
    assert check("--json") == 1
    said = capsys.readouterr().out
    found = verdicts(said)
    assert json.loads(said)["healthy"] is False
    assert {name for name, verdict in found.items() if verdict == "failure"} == {"GPU nodes", "custom kinds"}
    assert found["images"] == "skipped"
    rows = {row["check"]: row for row in json.loads(said)["checks"]}
    assert "kube-prometheus-stack" in rows["custom kinds"]["fix"]


def test_a_cluster_that_does_not_answer(kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing further is asked of it."""
    kubectl.play(CLIENT, Answer("version", complains="Unable to connect to the server: dial tcp: i/o timeout\n", code=1))
    assert check("--json") == 1
    found = verdicts(capsys.readouterr().out)
    assert found["server"] == "failure"
    assert {verdict for name, verdict in found.items() if name not in {"kubectl", "server", "values"}} == {"skipped"}
    assert len(kubectl.calls()) == 2


def test_no_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And how to get one; the values are looked at all the same."""
    (tmp_path / "helm").symlink_to(HELM)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check("--json") == 1
    found = verdicts(capsys.readouterr().out)
    assert (found["kubectl"], found["server"], found["values"]) == ("failure", "skipped", "ok")


def test_values_that_the_chart_refuses(kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]) -> None:
    """The chart's own sentence, without where in the templates it stands."""
    assert check("--set", "router.enabled=false") == 1
    said = capsys.readouterr().out
    assert "FAIL  mode disagg needs a router, which chains prefill and decode: set router.enabled=true" in said
    assert not [arguments for arguments, _ in kubectl.calls() if "apply" in arguments]


def test_rights_that_are_missing(kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions about the whole cluster become warnings, and the dry run says what may not be made."""
    forbidden = 'Error from server (Forbidden): nodes is forbidden: User "dev" cannot list resource "nodes"\n'
    kubectl.play(CLIENT, SERVER, CLASSES, Answer("get nodes", complains=forbidden, code=1), OPERATOR, QUOTAS, NAMESPACE, PODMONITORS,
                 Answer("apply", complains='Error from server (Forbidden): roles.rbac.authorization.k8s.io is forbidden\n', code=1))
    assert check("--json") == 1
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert rows["GPU nodes"]["verdict"] == "warning"
    assert "cannot list resource" in rows["GPU nodes"]["says"]
    assert (rows["dry run"]["verdict"], rows["dry run"]["fix"]) == ("failure", "kubectl auth can-i --list -n llm")


def test_a_missing_namespace_and_secret(kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the namespace nothing in it is asked for."""
    kubectl.play(*GOOD, Answer("get secret/hub", complains='Error from server (NotFound): secrets "hub" not found\n', code=1))
    assert check("--json", "--set", "model.tokenSecret=hub") == 1
    assert verdicts(capsys.readouterr().out)["secrets and claims"] == "failure"
    kubectl.play(*(one for one in GOOD if one is not NAMESPACE))
    assert check("--json") == 1
    found = verdicts(capsys.readouterr().out)
    assert (found["namespace"], found["dry run"]) == ("failure", "skipped")


def test_a_call_that_hangs_ends_at_its_deadline(kubectl: FakeKubectl) -> None:
    """The process is killed, too."""
    kubectl.play(Answer("get nodes", hangs=True))
    began = time.monotonic()
    with pytest.raises(UnavailableError, match=r"kubectl get did not answer within 0\.5 s"):
        Kubectl("llm", timeout_s=0.5).text("get", "nodes")
    assert time.monotonic() - began < 10


def test_an_answer_of_another_shape_is_no_answer(kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]) -> None:
    """It becomes a warning, not a traceback."""
    kubectl.play(CLIENT, SERVER, Answer("get storageclasses", "[]"), NODES, OPERATOR, QUOTAS, NAMESPACE, PODMONITORS, DRY_RUN)
    assert check("--json") == 0
    assert verdicts(capsys.readouterr().out)["storage class"] == "warning"


def test_the_context_is_passed_on(kubectl: FakeKubectl) -> None:
    """To every call."""
    assert check("--context", "staging") == 0
    assert all("--context=staging" in arguments for arguments, _ in kubectl.calls())


def pod_status(*states: object) -> Answer:
    """Of the pod that pulls."""
    statuses = [{"name": f"image-{i}", "state": state, "ready": False, "restartCount": 0} for i, state in enumerate(states)]
    pod = {"metadata": {"name": "p"}, "status": {"phase": "Pending", "containerStatuses": statuses}}
    return Answer("get pod tandem-image-check-", json.dumps(pod))


def test_images_are_pulled_by_a_pod_that_is_removed(kubectl: FakeKubectl) -> None:
    """Good, without a program `true`, refused: each image has its outcome."""
    kubectl.play(Answer("create"), Answer("delete pod"), pod_status(
        {"terminated": {"exitCode": 0, "reason": "Completed"}},
        {"waiting": {"reason": "RunContainerError", "message": "exec: true: not found"}},
        {"waiting": {"reason": "ImagePullBackOff", "message": "unauthorized"}},
    ))
    pulls = try_pulls(Kubectl("llm"), ["a:1", "b:1", "c:1"], ["registry"], timeout_s=30)
    assert [(pull.image, pull.failure) for pull in pulls] == [("a:1", ""), ("b:1", ""), ("c:1", "ImagePullBackOff: unauthorized")]
    (made, given), *_, (removed, _) = kubectl.calls()
    assert made[-2:] == ["create", "--filename=-"]
    spec = json.loads(given)["spec"]
    assert ([one["image"] for one in spec["containers"]], spec["imagePullSecrets"]) == (["a:1", "b:1", "c:1"], [{"name": "registry"}])
    assert removed[2:4] == ["delete", "pod"]
    assert removed[4] == json.loads(given)["metadata"]["name"]


def test_a_pull_that_takes_too_long_is_given_up(kubectl: FakeKubectl) -> None:
    """The pod is removed all the same."""
    kubectl.play(Answer("create"), Answer("delete pod"), pod_status({"waiting": {"reason": "ContainerCreating"}}))
    pulls = try_pulls(Kubectl("llm"), ["a:1"], [], timeout_s=0.3, pause=lambda _: None)
    assert pulls[0].failure == "not pulled in time"
    assert "delete" in kubectl.calls()[-1][0]


def test_a_pod_that_may_not_be_made(kubectl: FakeKubectl, capsys: pytest.CaptureFixture[str]) -> None:
    """Is a failure of the images' check, with the server's reason."""
    kubectl.play(*GOOD, Answer("create", complains="Error from server (Forbidden): pods is forbidden\n", code=1))
    assert check("--json", "--pull") == 1
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert "pods is forbidden" in rows["images"]["says"]


def test_a_chart_needs_helm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no helm"):
        render(Chosen(CHART, "llm", "tandem"))
