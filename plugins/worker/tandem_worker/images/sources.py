# SPDX-License-Identifier: Apache-2.0
"""What an element of the tensor `image` names, and whether it may be read. Pure: text and addresses in, decisions out."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from tandem_protocol.errors import RequestError
from tandem_protocol.image_files import inline_bytes

_SHOWN = 80
"""Characters of a client's text that go into a message."""
_MOST_OVERHEAD = 3
"""Bytes of padding: more base64 than this can't be a file of the allowed size, and isn't decoded."""
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Inline:
    """The file itself."""

    data: bytes


@dataclass(frozen=True)
class Remote:
    """A file behind HTTP."""

    url: str
    scheme: str
    host: str
    port: int
    target: str
    """Path and query, as they go into the request line."""

    @property
    def authority(self) -> str:
        """The header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class Local:
    """A file of this host."""

    path: Path


Source = Inline | Remote | Local


def parse_source(item: bytes, max_bytes: int) -> Source:
    """Reads one element: a URL (`http:`, `https:`, `file:`, `data:`) or the file in base64. Raises RequestError."""
    if len(item) // 4 * 3 > max_bytes + _MOST_OVERHEAD and item[:5].lower() != b"data:":
        raise too_large(max_bytes)
    data = inline_bytes(item)
    if data is not None:
        return Inline(_within(data, max_bytes))
    return _parse_file(_text(item)) if item[:5].lower() == b"file:" else parse_url(_text(item))


def parse_url(url: str) -> Remote:
    """Raises RequestError for what no image is fetched from."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise RequestError(f"image URL {shown(url)} is malformed: {exc}") from exc
    if parts.scheme not in _PORTS or not parts.hostname:
        raise RequestError(f"image URL {shown(url)} is not one: write http://host/path or https://host/path")
    if parts.username is not None or parts.password is not None:
        raise RequestError("an image URL carries a user name: leave it out")
    if not url.isprintable() or " " in url:
        raise RequestError(f"image URL {shown(url)} holds blanks or control characters: write them as %20 and so on")
    return Remote(url, parts.scheme, parts.hostname, port or _PORTS[parts.scheme], _target(parts))


def redirected(source: Remote, location: str) -> Remote:
    """Where a redirect leads; to be checked like any other. Raises RequestError."""
    target = parse_url(urljoin(source.url, location))
    if source.scheme == "https" and target.scheme == "http":
        raise RequestError(f"image URL {shown(source.url)} redirects from https to http: give the last URL itself if that is meant")
    return target


def host_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether the setting lets images come from this host; `allowed` is empty for any."""
    name = host.lower().rstrip(".")
    return not allowed or any(name == entry.lstrip(".") or (entry.startswith(".") and name.endswith(entry)) for entry in
                              (entry.lower() for entry in allowed))


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, also where it carries another one inside; False for what is no address."""
    try:
        parsed = ipaddress.ip_address(address.split("%", 1)[0])
    except ValueError:
        return False
    return all(one.is_global and not one.is_multicast and not one.is_reserved for one in _carried(parsed))


def local_path(source: Local, root: str) -> Path:
    """The file to read, links followed. Raises RequestError if `file:` is off, or the file lies elsewhere."""
    if not root:
        raise RequestError("file: images are off on this worker: send the file in base64, or set TANDEM_IMAGE_ROOT")
    folder, path = Path(root).resolve(), source.path.resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise RequestError(f"there is no image file {shown(str(source.path))} in the folder that this worker reads images from")
    return path


def shown(text: str) -> str:
    """A client's text, short enough for a message."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _carried(address: _Address) -> tuple[_Address, ...]:
    """The address, and the IPv4 addresses that transitional IPv6 addresses lead to."""
    if isinstance(address, ipaddress.IPv4Address):
        return (address,)
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    inner = [address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        return (ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF),)
    return (address, *(one for one in inner if one is not None))


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _parse_file(text: str) -> Local:
    parts = urlsplit(text)
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_absolute():
        raise RequestError(f"image URL {shown(text)} names no file: write file:///folder/name.png")
    return Local(path)


def _within(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise too_large(max_bytes)
    return data


def too_large(max_bytes: int) -> RequestError:
    """What a request gets whose files are too large."""
    return RequestError(f"the images of this request have more than {max_bytes} bytes (TANDEM_IMAGE_MAX_BYTES): send smaller files")


def _text(item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError as exc:
        raise RequestError(f"an image URL is not UTF-8 ({exc.reason} at byte {exc.start}): encode it as UTF-8") from exc
