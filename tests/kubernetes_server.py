# SPDX-License-Identifier: Apache-2.0
"""The API-server double on a thread of its own, for processes and blocking tests: TLS, tokens, a kubeconfig, ends and returns."""

import asyncio
import datetime as dt
import ipaddress
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kubernetes_double import NAMESPACE, Fault, KubernetesDouble

VERBS = ("list", "watch", "create", "patch", "delete")
TOKEN = "the-first-token"  # not a secret: the double's
_TIMEOUT_S = 20.0
T = TypeVar("T")


def rules(*verbs: str) -> list[dict[str, list[str]]]:
    """Of a Role on Leases."""
    return [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": list(verbs)}]


@dataclass
class KubernetesServer:
    """One API server at one address. Resource handling: `end` stops server and thread."""

    folder: Path
    double: KubernetesDouble = field(default_factory=lambda: KubernetesDouble(rules(*VERBS), tokens={TOKEN}))
    url: str = ""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _thread: threading.Thread | None = None

    def begin(self) -> "KubernetesServer":
        """Makes certificates, a kubeconfig and what a pod would have of its service account, and listens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.double.tls = make_certificates(self.folder)
        self.write_token(TOKEN)
        (self.folder / "namespace").write_text(NAMESPACE)
        self._thread = threading.Thread(target=self._loop.run_forever, name="kubernetes-double", daemon=True)
        self._thread.start()
        self.start()
        user = {"token": TOKEN}
        cluster = {"server": self.url, "certificate-authority": str(self.folder / "ca.crt")}
        context = {"cluster": "double", "user": "me", "namespace": NAMESPACE}
        self.kubeconfig.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "double", "clusters": [{"name": "double", "cluster": cluster}],
            "users": [{"name": "me", "user": user}], "contexts": [{"name": "double", "context": context}]}))
        return self

    @property
    def kubeconfig(self) -> Path:
        """For KUBECONFIG."""
        return self.folder / "kubeconfig"

    def write_token(self, token: str) -> None:
        """As the kubelet rotates it."""
        (self.folder / "token").write_text(token)

    def start(self) -> None:
        """Listens, again at the same port."""
        self.url = self._await(self.double.start)

    def stop(self) -> None:
        """Refuses connections and breaks those there are."""
        self._await(self.double.stop)

    def end(self) -> None:
        """Ends it all."""
        self.stop()
        self._await(_settle)
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not None:
            self._thread.join(_TIMEOUT_S)
        self._loop.close()

    def hang(self) -> None:
        """Answers nothing from now on; ended by `stop` and `start`."""
        self.do(lambda: self.double.faults.append(Fault(0, verbs=VERBS, times=10**9)))

    def do(self, change: Callable[[], T]) -> T:
        """Runs it on the server's loop."""

        async def run() -> T:
            return change()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(_TIMEOUT_S)

    def _await(self, step: "Callable[[], asyncio.Future[T]]") -> T:
        return asyncio.run_coroutine_threadsafe(step(), self._loop).result(_TIMEOUT_S)  # type: ignore[arg-type]


async def _settle() -> None:
    """Aborted connections are closed some turns of the loop later."""
    for _ in range(20):
        await asyncio.sleep(0)


def make_certificates(folder: Path) -> ssl.SSLContext:
    """A CA as `ca.crt`, and a server's context with a certificate of it for 127.0.0.1."""
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "double-ca")])
    now = dt.datetime.now(dt.UTC)

    def certificate(name: x509.Name, key: ec.EllipticCurvePublicKey, extension: x509.ExtensionType, critical: bool) -> x509.Certificate:
        builder = x509.CertificateBuilder(root, name, key, x509.random_serial_number(), now - dt.timedelta(hours=1),
                                          now + dt.timedelta(days=1))
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        identifiers = (x509.SubjectKeyIdentifier.from_public_key(key), issuer)
        for one, strict in ((extension, critical), *((identifier, False) for identifier in identifiers)):
            builder = builder.add_extension(one, critical=strict)
        return builder.sign(authority, hashes.SHA256())

    ca = certificate(root, authority.public_key(), x509.BasicConstraints(ca=True, path_length=None), critical=True)
    leaf = certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "double")]), server.public_key(),
                       x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    (folder / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM) + server.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context
