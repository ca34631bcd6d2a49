# SPDX-License-Identifier: Apache-2.0
"""Fetches image files over HTTP, from addresses that were checked. Edge module: httpx and name resolution.

A host's name is resolved once per hop, every address that it has is checked, and the connection goes to that very address: a name
that changes between the check and the connection changes nothing. Connections aren't kept, since a pool would hand one that was
verified for one name to another name of the same address. The caller bounds the time of the whole.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from tandem_protocol.errors import RequestError
from tandem_worker.images.config import ImageSettings
from tandem_worker.images.sources import Remote, host_allowed, is_public, redirected, shown, too_large

MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"User-Agent": "tandem", "Accept": "image/*", "Accept-Encoding": "identity"}
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Host and port -> its addresses, the preferred one first. Raises OSError."""
Charge = Callable[[int], None]
"""Takes bytes off the request's allowance; raises RequestError when it is used up."""


async def resolve(host: str, port: int) -> list[str]:
    """The system's own resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class Fetcher:
    """Fetches files. Stateless: a client lives as long as one file's way."""

    settings: ImageSettings
    resolve: Resolve = resolve

    async def fetch(self, source: Remote, charge: Charge) -> bytes:
        """The file, after at most `MAX_REDIRECTS` redirects. Raises RequestError, also for what may pass: UNAVAILABLE would say that this
        worker is the trouble, and routers would leave it alone for a while because some client's server is down."""
        async with httpx.AsyncClient(verify=_tls() if source.scheme == "https" else False, trust_env=False,
                                     timeout=self.settings.image_timeout_s,
                                     limits=httpx.Limits(max_keepalive_connections=0)) as client:  # fmt: skip
            for _ in range(MAX_REDIRECTS + 1):
                try:
                    answer = await self._hop(client, source, charge)
                except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
                    raise RequestError(f"image {shown(source.url)} can't be fetched ({type(exc).__name__}): {exc}") from exc
                if isinstance(answer, bytes):
                    return answer
                source = answer
        raise RequestError(f"image {shown(source.url)} lies behind more than {MAX_REDIRECTS} redirects: give the last URL itself")

    async def _hop(self, client: httpx.AsyncClient, source: Remote, charge: Charge) -> bytes | Remote:
        """The file, or where the answer redirects to."""
        address = await self._address(source)
        literal = f"[{address}]" if ":" in address else address
        url = f"{source.scheme}://{literal}:{source.port}{source.target}"
        async with client.stream("GET", url, headers={**_HEADERS, "Host": source.authority},
                                 extensions={"sni_hostname": source.host}) as answer:  # fmt: skip
            if answer.status_code in _REDIRECTS and "location" in answer.headers:
                return redirected(source, answer.headers["location"])
            _check(answer, source, self.settings.image_max_bytes)
            return await _body(answer, charge)

    async def _address(self, source: Remote) -> str:
        """The address to connect to. Every address of the name must be allowed, so that a name with a mixture gains nothing."""
        if not host_allowed(source.host, self.settings.image_hosts):
            raise RequestError(f"images may not be fetched from host {source.host!r} (TANDEM_IMAGE_HOSTS)")
        try:
            addresses = await self.resolve(source.host, source.port)
        except (OSError, UnicodeError) as exc:
            raise RequestError(f"the host of image {shown(source.url)} is not known: {exc}") from exc
        if not addresses:
            raise RequestError(f"the host of image {shown(source.url)} has no address")
        if not self.settings.image_allow_private and not all(map(is_public, addresses)):
            raise RequestError(f"image {shown(source.url)} is at an address that is not public: send the file in base64 "
                               "(or set TANDEM_IMAGE_ALLOW_PRIVATE)")
        return addresses[0]


def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _check(answer: httpx.Response, source: Remote, max_bytes: int) -> None:
    status = answer.status_code
    if status == 429 or status >= 500:
        raise RequestError(f"image {shown(source.url)} was answered with HTTP {status}: retry later")
    if status != 200:
        raise RequestError(f"image {shown(source.url)} was answered with HTTP {status}: check the URL")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(f"image {shown(source.url)} comes compressed, which wasn't asked for: send the file in base64")
    length = answer.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large(max_bytes)


async def _body(answer: httpx.Response, charge: Charge) -> bytes:
    chunks = []
    async for chunk in answer.aiter_raw():
        charge(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)
