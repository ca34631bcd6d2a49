# SPDX-License-Identifier: Apache-2.0
"""Settings of the planner's process: where it looks, whom it tells, and how long each may take. What it decides is set in `config`."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from tandem_planner.queries import Source
from tandem_protocol.discovery import check_url
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_protocol.settings import parse_float, parse_int, parse_words, setting

HOUR_S = 3600


class ConnectorKind(StrEnum):
    """Who starts and ends workers."""

    TRITON = "triton"
    """Models of one tritonserver are loaded and unloaded."""
    KUBERNETES = "kubernetes"
    DOCKER = "docker"
    VIRTUAL = "virtual"
    """Somebody else, who reads the decision in etcd and acknowledges it."""


def _http_url(text: str) -> str:
    parts = urlsplit(text.strip())
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("expected http://host:port")
    return text.strip().rstrip("/")


def _discovery_url(text: str) -> str:
    return check_url(text.strip())


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of one planner process, resolved; units are in the names or in the specs."""

    prometheus_endpoint: str = setting(
        env="PROMETHEUS_ENDPOINT", default="http://127.0.0.1:9090", parse=_http_url,
        help="Prometheus that scrapes routers and workers. Dynamo's variable; Dynamo's default is a cluster's name, so ours is local.",
    )
    metrics_source: Source = setting(  # noqa: RUF009 - makes a dataclass field, like dataclasses.field itself
        env="TANDEM_PLANNER_METRICS_SOURCE", default=Source.ROUTER, parse=Source,
        help="Whose metrics tell of the traffic: router (tandem_router_*) or dynamo (dynamo_frontend_*).",
    )
    metrics_model: str = setting(
        env="TANDEM_PLANNER_MODEL", default="", parse=str,
        help="Only traffic of this model, in any case; empty for all, since one fleet mostly serves one model.",
    )
    metrics_namespace: str = setting(
        env="DYN_NAMESPACE", default="dynamo", parse=str,
        help="`dynamo_namespace` of the source dynamo, and the namespace of the virtual connector's keys; Dynamo's default.",
    )
    query_timeout_s: float = setting(
        env="TANDEM_PLANNER_QUERY_TIMEOUT_S", default=5.0, parse=parse_float(0.1, 300), unit="s",
        help="How long one query to Prometheus may take; without an answer the fleet stays as it is.",
    )
    metrics_max_age_s: float = setting(
        env="TANDEM_PLANNER_METRICS_MAX_AGE_S", default=30.0, parse=parse_float(1, HOUR_S), unit="s",
        help="A worker whose metrics are older counts as unread: two of Prometheus' usual scrape intervals.",
    )
    start_delay_s: float = setting(
        env="TANDEM_PLANNER_START_DELAY_S", default=30.0, parse=parse_float(0, HOUR_S), unit="s",
        help="Time before the first look, so that Prometheus has scraped what it looks at. Dynamo's.",
    )

    connector: ConnectorKind = setting(  # noqa: RUF009 - as above
        env="TANDEM_PLANNER_CONNECTOR", default=ConnectorKind.TRITON, parse=ConnectorKind,
        help="Who starts and ends workers: triton, kubernetes, docker or virtual. triton: needs nothing but the server that is there.",
    )
    fleet: str = setting(
        env="TANDEM_PLANNER_FLEET", default="tandem", parse=str,
        help="Value of the label `tandem.dev/fleet` of what the connectors kubernetes and docker may scale; nothing else is touched.",
    )
    call_timeout_s: float = setting(
        env="TANDEM_PLANNER_CALL_TIMEOUT_S", default=10.0, parse=parse_float(0.1, 600), unit="s",
        help="How long one call to Triton, Kubernetes, Docker or etcd may take before it is tried again or given up.",
    )
    scale_timeout_s: float = setting(
        env="SCALING_MAX_WAIT_TIME", default=1800.0, parse=parse_float(1, 86_400), unit="s",
        help="How long a change of the fleet may take, until new workers take requests. Dynamo's: large models load slowly.",
    )
    scale_check_s: float = setting(
        env="SCALING_CHECK_INTERVAL", default=2.0, parse=parse_float(0.05, 600), unit="s",
        help="How often it is looked whether a change is done. 2 (Dynamo: 10): a look is cheap, and a late one delays the next decision.",
    )
    drain_timeout_s: float = setting(
        env="TANDEM_PLANNER_DRAIN_TIMEOUT_S", default=300.0, parse=parse_float(0, 86_400), unit="s",
        help="How long a worker that is to go may finish its requests and hand over its KV; long answers take minutes.",
    )
    triton_url: str = setting(
        env="TANDEM_PLANNER_TRITON_URL", default="http://127.0.0.1:8000", parse=_http_url,
        help="HTTP address of the tritonserver whose models the connector triton loads and unloads.",
    )
    triton_aggregated: str = setting(
        env="TANDEM_PLANNER_TRITON_AGGREGATED", default="vllm*", parse=str,
        help="Names of its models that are aggregated workers, with * and ?, blanks between; as `tandem serve` names them.",
    )
    triton_prefill: str = setting(
        env="TANDEM_PLANNER_TRITON_PREFILL", default="prefill*", parse=str, help="The same for prefill workers.",
    )
    triton_decode: str = setting(
        env="TANDEM_PLANNER_TRITON_DECODE", default="decode*", parse=str, help="The same for decode workers.",
    )
    triton_encode: str = setting(
        env="TANDEM_PLANNER_TRITON_ENCODE", default="encode encode_[0-9]*", parse=str,
        help="The same for encode workers; not the ensembles, which begin alike.",
    )
    kubernetes_namespace: str = setting(
        env="TANDEM_PLANNER_NAMESPACE", default="", parse=str,
        help="Namespace of the workers; empty for the planner's own, which is all that its role allows.",
    )
    docker_host: str = setting(
        env="DOCKER_HOST", default="", parse=str, flag=False,
        help="Where the Docker Engine listens; empty for its usual socket. Docker's own variable.",
    )
    virtual_store: str = setting(
        env="TANDEM_PLANNER_VIRTUAL", default="", parse=_discovery_url,
        help="etcd://host:port in which the connector virtual leaves its decisions; empty for that of TANDEM_DISCOVERY.",
    )

    discovery: str = setting(
        env="TANDEM_DISCOVERY", default="", parse=_discovery_url, flag=False,
        help="Where workers are found: their roles, states and admin ports. Without it no worker's load is known.",
    )
    state: str = setting(
        env="TANDEM_PLANNER_STATE", default="", parse=str,
        help="File that keeps what the planner has learned, so that a restart makes no jump; empty for none.",
    )
    admin_host: str = setting(
        env="TANDEM_PLANNER_ADMIN_HOST", default="127.0.0.1", parse=str, help="Address of /live, /health, /metrics and /decision.",
    )
    admin_port: int = setting(
        env="TANDEM_PLANNER_ADMIN_PORT", default=8078, parse=parse_int(0, 65_535), unit="port",
        help="Port of these; 0 for any free one. Below the routers' 8079.",
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that contradict each other."""
        if self.connector is ConnectorKind.TRITON and not self.discovery:
            raise ConfigError("the connector triton finds the workers to drain in discovery: set TANDEM_DISCOVERY as the workers have it")
        if self.connector is ConnectorKind.VIRTUAL and not self.store.startswith("etcd:"):
            raise ConfigError("the connector virtual leaves its decisions in etcd: set TANDEM_PLANNER_VIRTUAL=etcd://host:port")

    @property
    def store(self) -> str:
        """Where the connector virtual leaves its decisions."""
        return self.virtual_store or self.discovery

    @property
    def triton_patterns(self) -> Mapping[Role, tuple[str, ...]]:
        """Role -> names of its models."""
        named = {Role.AGGREGATED: self.triton_aggregated, Role.PREFILL: self.triton_prefill, Role.DECODE: self.triton_decode,
                 Role.ENCODE: self.triton_encode}
        return {role: parse_words(text) for role, text in named.items()}
