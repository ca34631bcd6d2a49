# SPDX-License-Identifier: Apache-2.0
"""Wrong values stop at the install: contradictions with a sentence that says the fix, typos and types with the schema's words."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from charts import CHART, refusal

ROUTER = ("router.enabled=true", 'discovery.kind="etcd"')
ENCODE = ("encode.enabled=true",)
CONTRADICTIONS = (
    ("agg", ('mode="disagg"',), "mode disagg needs a router, which chains prefill and decode: set router.enabled=true"),
    ("agg", ("planner.enabled=true",), "the planner reads the routers' metrics: set router.enabled=true"),
    ("agg", ("roles.prefill.replicas=2",), "roles.prefill has values, but mode agg has no such workers"),
    ("disagg", ("roles.aggregated.replicas=2",), "roles.aggregated has values, but mode disagg has no such workers"),
    ("disagg", ('roles.decode.args=["--spec-method","ngram"]',),
     "prefill speculates by nothing and decode by --spec-method ngram, and only workers that speculate alike are paired"),
    ("agg", ("encode.enabled=true",), "encode workers are asked by a router before the others: set router.enabled=true"),
    ("disagg_planner", ("planner.maxEncode=2",), "planner.maxEncode is for a planner with encode workers: set encode.enabled=true"),
    ("disagg_planner", (*ENCODE, "planner.maxEncode=2", 'roles.encode.autoscaling.kind="hpa"'),
     "encode: planner and autoscaling would scale against each other"),
    ("disagg", ("roles.encode.replicas=2",), "roles.encode has values, but there are no such workers: set encode.enabled=true"),
    ("disagg", ('encode.embeddings.existingClaim="x"',), "existingClaim is for encode workers, and there are none"),
    ("disagg", (*ENCODE, 'roles.encode.connector="nixl"'), "roles.encode: an encode worker has no KV: remove connector and kvTiers"),
    ("disagg", (*ENCODE, "roles.encode.dataParallelSize=2"), "an encode worker is one engine in one pod: set replicas instead"),
    ("disagg", (*ENCODE, "roles.prefill.nodes=2", "roles.prefill.tensorParallelSize=2"),
     "prefill: an engine over several nodes takes no embeddings"),
    ("disagg", (*ENCODE, "encode.embeddings.maxGB=40"), "encode.embeddings.size 20Gi has no room for maxGB 40: raise it"),
    ("disagg", (*ENCODE, 'encode.embeddings.accessMode="ReadWriteOnce"'), "ReadWriteOnce can't be mounted on several nodes"),
    ("disagg", ('worker.args=["--encode","1"]',), "the argument --encode is the chart's: set encode.enabled instead"),
    ("disagg", ('worker.env=[{"name":"TANDEM_EMBEDDING_FOLDER","value":"/x"}]',),
     "env has TANDEM_EMBEDDING_FOLDER, which the chart sets itself"),
    ("agg", ('image.tag="1"', f'image.digest="sha256:{"0" * 64}"'), "image.tag and image.digest exclude each other"),
    ("agg", ("service.grpcPort=8000",), "service.httpPort and service.grpcPort are both 8000: give each its own"),
    ("agg", ('networkPolicy.prometheusNamespaceLabels={"kubernetes.io/metadata.name":null}',),
     "would open the admin ports to every namespace"),
    ("agg", ("model.offline=true", 'model.tokenSecret="hub"'), "model.offline never asks the hub, so model.tokenSecret has no use"),
    ("agg", ("model.offline=true",), "model.offline with an empty cache finds no model"),
    ("agg", ('model.cache.kind="hostPath"',), "needs model.cache.hostPath, a folder of each node"),
    ("agg", ('model.cache.hostPath="/srv"',), "model.cache.hostPath is for the kind hostPath, and the kind is emptyDir"),
    ("agg", ('model.cache.existingClaim="x"',), "model.cache.existingClaim is for the kind claim, and the kind is emptyDir"),
    ("disagg", ('model.cache.kind="claim"', 'model.cache.accessMode="ReadWriteOnce"'), "ReadWriteOnce can't be mounted on several nodes"),
    ("agg", ("router.enabled=true",), "a router finds its workers in discovery: set discovery.kind to etcd or kubernetes"),
    ("agg", ('discovery.kind="kubernetes"',), "discovery.kind kubernetes is for routers, and there is none: set router.enabled=true"),
    ("disagg_kubernetes", ('discovery.prefix="team"',), "in Kubernetes the fleet is the release's name and namespace"),
    ("disagg", ("discovery.kubernetes.leaseSeconds=30",),
     "discovery.kubernetes.leaseSeconds is for the kind kubernetes, and the kind is etcd"),
    ("disagg_kubernetes", ('discovery.etcd.endpoint="etcd:2379"',),
     "discovery.etcd.endpoint is for the kind etcd, and the kind is kubernetes"),
    ("disagg_kubernetes", ('worker.env=[{"name":"POD_UID","value":"x"}]',), "env has POD_UID, which the chart sets itself"),
    ("agg", ('discovery.etcd.endpoint="etcd:2379"',), "discovery.etcd.endpoint is for the kind etcd, and the kind is none"),
    ("agg", ("router.enabled=true", 'discovery.kind="folder"'), "discovery.kind folder needs discovery.folderClaim"),
    ("disagg", ('discovery.folderClaim="meet"',), "discovery.folderClaim is for the kind folder, and the kind is etcd"),
    ("agg", ('discovery.kind="folder"', 'discovery.folderClaim="x"', 'worker.affinity={"nodeAffinity":{"a":1}}'),
     "keeps all pods on one node by an affinity of its own"),
    ("agg", ('gateway.kind="route"',), "gateway.kind route needs gateway.name, the Gateway that its routes attach to"),
    ("agg", ('gateway.name="front"',), "gateway.name is for the kinds route and inferencePool, and the kind is none"),
    ("agg", ('gateway.kind="inferencePool"', 'gateway.name="front"'), "puts its picker in front of routers: set router.enabled=true"),
    ("agg", ('gateway.kind="standalone"',), "gateway.kind standalone puts its picker in front of routers"),
    ("agg", ('platform="cpu"', "worker.nodes=2", "worker.tensorParallelSize=2"), "engines over several nodes need GPUs"),
    ("agg", ("worker.nodes=2", "worker.dataParallelSize=2"), "multiNodeStrategy tensor is for one engine, and dataParallelSize is 2"),
    ("agg", ("worker.nodes=2", "worker.tensorParallelSize=3"),
     "3 GPUs (tensorParallelSize x pipelineParallelSize) can't be shared equally by 2 nodes"),
    ("agg", ("worker.nodes=2", "worker.tensorParallelSize=2", 'worker.connector="kvbm"', "worker.kvTiers.hostGB=1"),
     "KV tiers don't span nodes"),
    ("agg", ("worker.nodes=3", "worker.dataParallelSize=4", 'worker.multiNodeStrategy="data"'),
     "dataParallelSize 4 can't be shared equally by 3 nodes"),
    ("disagg", ('roles.prefill.connector="kvbm"', "roles.prefill.kvTiers.hostGB=1"),
     "prefill: connector \"kvbm\" can't hand KV over: add nixl to it"),
    ("agg", ('worker.connector="nixl nixl"',), "names one twice: name each once"),
    ("agg", ("worker.kvTiers.hostGB=1",), "kvTiers are those of the connector kvbm: add kvbm to connector"),
    ("agg", ('worker.connector="kvbm"',), "the connector kvbm has no tier: set kvTiers.hostGB or kvTiers.diskGB"),
    ("agg", ('worker.connector="lmcache"', 'platform="cpu"'), "LMCache moves no KV blocks on CPUs: choose the connector kvbm"),
    ("agg", ('worker.rdmaResource="rdma/hca"', 'platform="cpu"'), "rdmaResource is for GPUs"),
    ("agg", ('worker.connector="kvbm"', "worker.kvTiers.hostGB=20"),
     "sharedMemory 8Gi is too small: the engine needs 1Gi of it, and the host tier 20 GB"),
    ("agg", ('worker.sharedMemory="512Mi"',), "sharedMemory 512Mi is too small"),
    ("agg", ('worker.resources.limits={"memory":"4Gi"}',), "the memory limit 4Gi is below sharedMemory 8Gi, which counts to it"),
    ("disagg_planner", ('roles.decode.autoscaling.kind="hpa"',), "decode: planner and autoscaling would scale against each other"),
    ("agg", ('worker.autoscaling.kind="hpa"', "worker.autoscaling.minReplicas=5"), "autoscaling.minReplicas 5 is above maxReplicas 4"),
    ("agg", ('worker.autoscaling.kind="keda"',), "autoscaling.kind keda asks Prometheus: set autoscaling.prometheusUrl"),
    ("agg", ('worker.args=["--tensor-parallel-size","2"]',),
     "the argument --tensor-parallel-size is the chart's: set tensorParallelSize instead"),
    ("agg", ('worker.args=["--kv-event-port=1"]',),
     "the argument --kv-event-port is fixed, since services, probes and policies rest on it"),
    ("agg", ('worker.env=[{"name":"TANDEM_GRPC_URL","value":"x:1"}]',),
     "roles.aggregated: env has TANDEM_GRPC_URL, which the chart sets itself"),
    ("disagg", ('router.env=[{"name":"DYN_ROUTER_MODE","value":"kv"}]',), "router: env has DYN_ROUTER_MODE, which the chart sets itself"),
    ("agg", ('worker.env=[{"name":"A","value":"1"},{"name":"A","value":"2"}]',), "env has A twice: keep one"),
)
TYPOS = (
    ("workers.replicas=1", "workers"),
    ("worker.replica=1", "replica"),
    ('worker.replicas="two"', "integer"),
    ("worker.replicas=-1", "greater than or equal to 0"),
    ('mode="aggregated"', "must be one of"),
    ('router.mode="kv-aware"', "must be one of"),
    ("roles.prefil.replicas=1", "prefil"),
    ("encode.replicas=2", "replicas"),
    ("encode.embeddings.maxGB=0", "maxGB"),
    ("roles.prefill.gpus=1", "gpus"),
    ('worker.connector="nixl,kvbm"', "pattern"),
    ('worker.gpuResource="gpu"', "pattern"),
    ('worker.sharedMemory="8 GB"', "pattern"),
    ('worker.env=[{"value":"x"}]', "name"),
    ("service.httpPort=70000", "65535"),
    ('image.digest="latest"', "pattern"),
    ('discovery.kind="zookeeper"', "must be one of"),
    ('planner.prometheusUrl="prometheus:9090"', "pattern"),
    ("monitoring.podMonitor.interval=5", "interval"),
)


@pytest.mark.parametrize(("mode", "sets", "sentence"), CONTRADICTIONS, ids=[case[2][:40] for case in CONTRADICTIONS])
def test_contradictions_are_refused_with_a_sentence(mode: str, sets: tuple[str, ...], sentence: str) -> None:
    """Before anything reaches the cluster."""
    assert sentence in refusal(mode, *sets)


@pytest.mark.parametrize(("one", "word"), TYPOS)
def test_typos_and_types_are_refused_by_the_schema(one: str, word: str) -> None:
    """The message names what is wrong."""
    said = refusal("agg", one)
    assert "values don't meet the specifications of the schema" in said
    assert word in said


def objects(schema: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of an object that names properties."""
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield where, schema
        for key, value in schema.items():
            yield from objects(value, f"{where}/{key}")


def test_the_schema_is_closed_everywhere() -> None:
    """No object with named properties takes others."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert [where for where, one in objects(schema) if one.get("additionalProperties") is not False] == []
