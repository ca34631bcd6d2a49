# SPDX-License-Identifier: Apache-2.0
"""How our processes reach Kubernetes' API: the pod that they are, the server and its credentials, and what its refusals mean.

Shared by discovery and by the planner's connector. Edge module: knows `kubernetes`. Its own retries are off, since they would wait as
long as a server tells them to; who calls decides what is tried again. The service account's token is read again every minute by the
library, and at once by whoever connects anew after a 401; certificates are checked against the cluster's CA.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.incluster_config import InClusterConfigLoader

from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.settings import resolve, setting

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where every pod with a token finds it, the cluster's CA and its namespace."""
UNREACHABLE = (urllib3.exceptions.HTTPError, OSError, ConfigException)
"""No answer, half of one, or a token that can't be read just now."""
_PASSING = frozenset({0, 409, 429, 500, 502, 503, 504})
"""0 is the library's word for a TLS handshake that failed, as while certificates are being changed."""


@dataclass(frozen=True)
class PodSettings:
    """The pod that this process runs in, as the downward API tells it; the variables are Dynamo's."""

    pod_name: str = setting(
        env="POD_NAME", default="", parse=str, flag=False,
        help="The pod's own name (downward API, `metadata.name`). With `POD_UID` the pod owns its records in Kubernetes, which go with it.",
    )
    pod_uid: str = setting(env="POD_UID", default="", parse=str, flag=False, help="The pod's own uid (downward API, `metadata.uid`).")
    pod_namespace: str = setting(
        env="POD_NAMESPACE", default="", parse=str, flag=False,
        help="The pod's own namespace (downward API, `metadata.namespace`); unset: that of its service account.",
    )


def pod_settings(environ: Mapping[str, str] | None = None) -> PodSettings:
    """Of the environment."""
    return resolve(PodSettings, {}, os.environ if environ is None else environ)


def own_namespace() -> str:
    """Of the pod, or `default` outside of one."""
    file = SERVICE_ACCOUNT / "namespace"
    return pod_settings().pod_namespace or (file.read_text().strip() if file.exists() else "default")


def load_settings(purpose: str) -> Any:
    """Address and credentials of the cluster that we run in, or else of the kubeconfig. Raises ConfigError, which names the purpose."""
    settings = client.Configuration()
    try:
        try:
            InClusterConfigLoader(token_filename=str(SERVICE_ACCOUNT / "token"), cert_filename=str(SERVICE_ACCOUNT / "ca.crt"),
                                  environ=os.environ).load_and_set(settings)
            settings.proxy = None  # a proxy is for the world outside of the cluster
        except ConfigException:
            config.load_kube_config(os.environ.get("KUBECONFIG") or None, client_configuration=settings)
    except (ConfigException, OSError) as exc:
        raise ConfigError(f"there is no cluster {purpose}: run in a pod, or set KUBECONFIG ({exc})") from exc
    return settings


def api_client(settings: Any) -> Any:
    """A client that retries nothing by itself."""
    settings.retries = False
    return client.ApiClient(settings)


class MissingError(UnavailableError):
    """There is no such object, or no such kind."""


@dataclass(frozen=True)
class Pause:
    """What to do about an answer that may pass."""

    wait_s: float
    reason: str


def judge(exc: Any, wait_s: float, longest_s: float, rights: str) -> Pause:
    """The pause before the next try: what the server asks for, else `wait_s`, at most `longest_s`.

    Raises MissingError for 404 and UnavailableError for what won't pass; `rights` says which page lists the rights to give.
    """
    if exc.status == 404:
        raise MissingError(f"Kubernetes has no such object: {exc.reason}") from exc
    if exc.status in {401, 403}:
        raise UnavailableError(f"Kubernetes refuses ({exc.status} {exc.reason}): {rights} lists the rights to give") from exc
    if exc.status not in _PASSING:
        raise UnavailableError(f"Kubernetes refuses: {exc.status} {exc.reason} {str(exc.body)[:300]}") from exc
    asked = str((exc.headers or {}).get("Retry-After", ""))
    return Pause(min(float(asked) if asked.isdigit() else wait_s, longest_s), f"{exc.status} {exc.reason}")


__all__ = ["SERVICE_ACCOUNT", "UNREACHABLE", "ApiException", "MissingError", "Pause", "PodSettings", "api_client", "judge",
           "load_settings", "own_namespace", "pod_settings"]
