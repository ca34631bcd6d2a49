# SPDX-License-Identifier: Apache-2.0
"""Makes connectors from settings. Each imports its edge only when it is the chosen one, so that no host needs all clients."""

from tandem_planner.connectors import Means
from tandem_planner.connectors.draining import Drainer
from tandem_planner.connectors.interface import Connector
from tandem_protocol.errors import ConfigError


def open_triton(means: Means) -> Connector:
    """Models of one tritonserver. Raises ConfigError without discovery."""
    from tandem_planner.connectors.triton import TritonConnector
    from tandem_planner.connectors.triton_server import TritonServer

    if means.records is None:
        raise ConfigError("the connector triton finds the workers to drain in discovery: set TANDEM_DISCOVERY as the workers have it")
    patterns = {role: means.settings.triton_patterns[role] for role in means.roles}
    return TritonConnector(TritonServer(means.settings.triton_url, means.bounds), means.records, patterns, _drainer(means), means.bounds)


def open_kubernetes(means: Means) -> Connector:
    """Workloads of one namespace. Raises ConfigError without a cluster."""
    from tandem_planner.connectors.kubernetes import KubernetesConnector
    from tandem_planner.connectors.kubernetes_api import connect

    return KubernetesConnector(connect(means.settings.kubernetes_namespace, means.bounds.call_s), means.settings.fleet, means.bounds)


def open_docker(means: Means) -> Connector:
    """Containers of one host. Raises ConfigError without a Docker Engine."""
    from tandem_planner.connectors.docker import DockerConnector, connect

    engine = connect(means.settings.docker_host, means.bounds.call_s)
    return DockerConnector(engine, means.settings.fleet, _drainer(means), means.bounds)


def open_virtual(means: Means) -> Connector:
    """Decisions in etcd. Raises ConfigError for another store."""
    from tandem_planner.connectors.virtual import VirtualConnector

    return VirtualConnector(means.settings.store, means.settings.metrics_namespace, means.bounds, means.roles)


def _drainer(means: Means) -> Drainer:
    return Drainer(means.bounds.drain_s, means.bounds.call_s)
