# SPDX-License-Identifier: Apache-2.0
"""The chart's encode workers: one engine each without KV, and one folder of embeddings that all workers mount."""

from pathlib import Path

import pytest

from chart_workers import launched, parsed, worker_of
from charts import NAME, Document, container, environment, find, names, pod, render
from tandem_planner.arguments import parse as parse_planner
from tandem_protocol.roles import Role
from tandem_worker.config import load_settings
from tandem_worker.encode.config import embedding_transfer
from tandem_worker.encode.config import load_settings as load_embedding_settings

ENCODE = ("encode.enabled=true",)
AGG_ROUTER = ("router.enabled=true", 'discovery.kind="etcd"')
TIERS = ('worker.connector="kvbm"', "worker.kvTiers.hostGB=20", 'worker.sharedMemory="32Gi"')


def volumes_of(documents: list[Document], role: str) -> dict[str, Document]:
    """Of a role's pod."""
    return {volume["name"]: volume for volume in pod(documents, f"{NAME}-{role}")["spec"]["volumes"]}


def test_there_are_none_unless_asked_for() -> None:
    """Nor a folder."""
    documents = render("disagg")
    assert f"{NAME}-encode" not in names(documents, "Deployment")
    assert names(documents, "PersistentVolumeClaim") == set()
    assert "embeddings" not in volumes_of(documents, "prefill")
    assert "TANDEM_EMBEDDING_FOLDER" not in environment(worker_of(documents, "prefill"))


@pytest.mark.parametrize(("mode", "sets"), [("agg", (*AGG_ROUTER, *TIERS)), ("disagg", ('platform="cpu"', "worker.nodes=1"))])
def test_the_launcher_starts_one_engine_that_encodes(mode: str, sets: tuple[str, ...], tmp_path: Path) -> None:
    """With the arguments of all workers, of which KV is no matter; the worker's own settings take what its pod has."""
    documents = render(mode, *ENCODE, *sets, 'worker.args=["--max-model-len","8192"]')
    options = parsed(launched(worker_of(documents, "encode"), tmp_path))
    assert (options.counts.encode, options.counts.aggregated, options.counts.routers, options.only) == (1, 0, 0, None)
    assert options.engine_arguments == {"max_model_len": 8192}
    found = load_settings({"role": "encode", "worker_index": "1"}, environment(worker_of(documents, "encode")))
    assert (found.effective_role, found.effective_connectors, found.effective_admin_port) == (Role.ENCODE, ("none",), 8081)
    assert [one["name"] for one in pod(documents, f"{NAME}-encode")["spec"]["containers"]] == ["worker"]


@pytest.mark.parametrize(("mode", "sets", "consumers"), [("agg", AGG_ROUTER, ("aggregated",)), ("disagg", (), ("prefill", "decode"))])
def test_all_workers_share_one_folder(mode: str, sets: tuple[str, ...], consumers: tuple[str, ...]) -> None:
    """Producers and consumers agree on it and its bounds, and mount the same claim there."""
    documents = render(mode, *ENCODE, *sets, "encode.embeddings.maxGB=12", 'encode.embeddings.storageClass="fast"')
    transfers = []
    for role in ("encode", *consumers):
        one = worker_of(documents, role)
        transfer = embedding_transfer(load_embedding_settings(environment(one)), Role(role))
        assert transfer is not None
        mounts = {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
        assert mounts["embeddings"] == transfer["ec_connector_extra_config"]["folder"]
        assert volumes_of(documents, role)["embeddings"]["persistentVolumeClaim"] == {"claimName": f"{NAME}-embeddings"}
        transfers.append(transfer)
    assert [transfer["ec_role"] for transfer in transfers] == ["ec_producer", *["ec_consumer"] * len(consumers)]
    assert {str(transfer["ec_connector_extra_config"]) for transfer in transfers} == {str(transfers[0]["ec_connector_extra_config"])}
    assert transfers[0]["ec_connector_extra_config"]["max_bytes"] == 12_000_000_000
    claim = find(documents, "PersistentVolumeClaim", f"{NAME}-embeddings")["spec"]
    assert (claim["accessModes"], claim["storageClassName"]) == (["ReadWriteMany"], "fast")


def test_a_claim_of_ones_own_is_taken() -> None:
    """And none is made."""
    documents = render("disagg", *ENCODE, 'encode.embeddings.existingClaim="images"')
    assert volumes_of(documents, "decode")["embeddings"]["persistentVolumeClaim"] == {"claimName": "images"}
    assert names(documents, "PersistentVolumeClaim") == set()


def test_the_role_is_scaled_guarded_and_reached_like_the_others() -> None:
    """Replicas of its own, probes, fleet labels, a disruption budget, and the routers' way through the network policy."""
    documents = render("disagg", *ENCODE, "roles.encode.replicas=3", "worker.tensorParallelSize=2", "roles.encode.tensorParallelSize=1")
    workload = find(documents, "Deployment", f"{NAME}-encode")
    assert workload["spec"]["replicas"] == 3
    assert workload["metadata"]["labels"]["tandem.dev/role"] == "encode"
    one = container(workload["spec"]["template"], "worker")
    assert one["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert one["readinessProbe"]["httpGet"] == {"path": "/health", "port": "admin"}
    assert not {"kv-events", "kv-replay"} & {port["name"] for port in one["ports"]}, "it has no KV"
    assert f"{NAME}-encode" in names(documents, "PodDisruptionBudget")
    [policy] = [one for one in documents if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == f"{NAME}-workers"]
    assert policy["spec"]["podSelector"]["matchExpressions"][0]["values"] == ["prefill", "decode", "encode"]


def test_the_planner_scales_them_only_if_it_may() -> None:
    """Its settings and its rights go together."""
    for most, scaled in ((0, False), (3, True)):
        documents = render("disagg_planner", *ENCODE, f"planner.maxEncode={most}", "roles.encode.tensorParallelSize=2")
        planner = parse_planner([], environment(container(pod(documents, f"{NAME}-planner"), "planner")))
        assert (planner.config.max_encode, Role.ENCODE in planner.config.roles) == (most, scaled)
        assert planner.config.decode_engine_num_gpu == 1
        assert planner.config.encode_engine_num_gpu == (2 if scaled else 1)
        scales = [name for rule in find(documents, "Role", f"{NAME}-planner")["rules"] for name in rule.get("resourceNames", ())]
        assert (f"{NAME}-encode" in scales) is scaled
