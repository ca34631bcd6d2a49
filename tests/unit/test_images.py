# SPDX-License-Identifier: Apache-2.0
"""Images of requests: what they may be and where they may come from, and that whatever is wrong gets one clear error."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from aiohttp import web

from tandem_protocol.errors import ErrorCode, RequestError, TandemError
from tandem_protocol.image_files import content_id
from tandem_worker.images.config import ImageSettings, load_settings
from tandem_worker.images.fetch import MAX_REDIRECTS, Fetcher, resolve
from tandem_worker.images.reader import ImageReader
from tandem_worker.images.sources import Inline, Local, Remote, host_allowed, is_public, parse_source, parse_url, redirected
from vision_models import make_image

LIMIT = 1 << 20
PRIVATE = ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255",
           "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
           "2002:7f00:1::", "2001:0:7f00:1::", "not an address", "")


@pytest.mark.parametrize("address", PRIVATE)
def test_no_address_of_a_private_net_is_public(address: str) -> None:
    """Also not one that carries a private one inside."""
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    """In both families, and through a translator."""
    assert is_public(address)


def test_an_element_is_a_url_of_a_known_kind_or_base64() -> None:
    """What vllm_backend takes, plus URLs."""
    data = make_image(1)
    encoded = base64.b64encode(data)
    assert parse_source(encoded, LIMIT) == Inline(data)
    assert parse_source(b"data:image/png;base64," + encoded, LIMIT) == Inline(data)
    assert parse_source(b"data:image/png,%89PNG", LIMIT) == Inline(b"\x89PNG")
    assert parse_source(b"file:///images/a%20b.png", LIMIT) == Local(Path("/images/a b.png"))
    remote = parse_source(b"https://example.org:8443/a/b.png?size=1", LIMIT)
    assert remote == Remote("https://example.org:8443/a/b.png?size=1", "https", "example.org", 8443, "/a/b.png?size=1")
    assert isinstance(remote, Remote)
    assert remote.authority == "example.org:8443"
    assert parse_url("http://[::1]/").authority == "[::1]"


@pytest.mark.parametrize("item", [
    b"ftp://example.org/a.png", b"http://", b"http://user:word@example.org/a.png", b"http://example.org:99999/", b"http://example.org/a b",
    b"http://example.org/\r\nHost: other", b"data:image/png;base64", b"file:relative.png", b"file://other.host/a.png", b"no base64!",
    b"http://[::1/", b"http://\xff/",
])  # fmt: skip
def test_what_is_neither_is_refused(item: bytes) -> None:
    """With a sentence, not with whatever a parser raises."""
    with pytest.raises(RequestError):
        parse_source(item, LIMIT)


@pytest.mark.parametrize("item", [base64.b64encode(bytes(101)), b"data:image/png;base64," + base64.b64encode(bytes(101)),
                                  b"data:," + b"%00" * 101])
def test_a_file_that_is_too_large_is_refused_as_it_is_read(item: bytes) -> None:
    """In whichever way it is written."""
    with pytest.raises(RequestError, match="TANDEM_IMAGE_MAX_BYTES"):
        parse_source(item, 100)


def test_hosts_may_be_listed() -> None:
    """By name, or with all below."""
    assert host_allowed("any.example", ())
    assert host_allowed("CDN.example.org.", ("cdn.example.org",))
    assert host_allowed("a.example.org", (".example.org",))
    assert host_allowed("example.org", (".example.org",))
    assert not host_allowed("evilexample.org", (".example.org",))
    assert not host_allowed("a.example.org", ("example.org",))


def test_a_redirect_does_not_leave_tls() -> None:
    """It may lead elsewhere otherwise, also by a relative location."""
    source = parse_url("https://example.org/a/b.png")
    assert redirected(source, "../c.png").url == "https://example.org/c.png"
    assert redirected(source, "//cdn.example.org/c.png").host == "cdn.example.org"
    for location in ("http://example.org/c.png", "file:///etc/passwd", "https://me@example.org/"):
        with pytest.raises(RequestError):
            redirected(source, location)


def test_settings_come_from_the_environment() -> None:
    """And are checked."""
    settings = load_settings({"TANDEM_IMAGE_HOSTS": "a.example .example.org", "TANDEM_IMAGE_MAX_PIXELS": "1000"})
    assert settings.image_hosts == ("a.example", ".example.org")
    assert settings.image_max_pixels == 1000
    with pytest.raises(TandemError, match="absolute"):
        load_settings({"TANDEM_IMAGE_ROOT": "relative"})


@dataclass
class Site:
    """A web server of the test's own."""

    port: int
    seen: list[str] = field(default_factory=list)
    """Host headers of the requests that came."""
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str, host: str = "images.example") -> bytes:
        """Of a path, under a name that resolves to this server."""
        return f"http://{host}:{self.port}{path}".encode()


async def _pictures(request: web.Request) -> web.StreamResponse:
    match request.path:
        case "/ok.png":
            return web.Response(body=make_image(1), content_type="image/png")
        case "/large.png":
            return web.Response(body=bytes(5000))
        case "/endless.png":
            return await _endless(request)
        case "/text.html":
            return web.Response(text="<html>no image</html>")
        case "/slow.png":
            await asyncio.Event().wait()
        case "/busy.png":
            raise web.HTTPServiceUnavailable
        case "/moved.png":
            raise web.HTTPFound("/ok.png")
        case "/inside.png":
            raise web.HTTPFound(f"http://inside.example:{request.url.port}/ok.png")
        case "/loop.png":
            raise web.HTTPFound("/loop.png")
        case "/zipped.png":
            return web.Response(body=b"zzz", headers={"Content-Encoding": "gzip"})
    raise web.HTTPNotFound


async def _endless(request: web.Request) -> web.StreamResponse:
    """A body without a length."""
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(bytes(1000))


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    """A running server."""
    app = web.Application()
    found = Site(0)

    async def note(request: web.Request) -> web.StreamResponse:
        found.seen.append(request.host)
        found.asked.set()
        return await _pictures(request)

    app.router.add_get("/{path:.*}", note)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    listener = web.TCPSite(runner, "127.0.0.1", 0)
    await listener.start()
    found.port = runner.addresses[0][1]
    try:
        yield found
    finally:
        await runner.cleanup()


async def _names(host: str, _port: int) -> list[str]:
    """Everything is this host, but one name has a private address besides; unknown names are unknown."""
    if host == "unknown.example":
        raise OSError("no such name")
    return ["127.0.0.1", "10.0.0.1"] if host == "inside.example" else ["127.0.0.1"]


OPEN = ImageSettings(image_max_bytes=4000, image_timeout_s=5, image_allow_private=True)
PNG = make_image(1, 28, 28)


def reader(settings: ImageSettings = OPEN, names: Callable[[str, int], Awaitable[list[str]]] = _names) -> ImageReader:
    """With names of the test's own."""
    return ImageReader(settings, Fetcher(settings, names))


async def test_images_come_in_order_from_everywhere(tmp_path: Path) -> None:
    """Base64, data:, http: with and without a redirect, and file: in the allowed folder; equal files have equal ids."""
    (tmp_path / "a.png").write_bytes(PNG)
    settings = replace(OPEN, image_root=str(tmp_path), image_max_bytes=1 << 20)
    async with site() as server:
        items = [base64.b64encode(PNG), server.url("/moved.png"), (tmp_path / "a.png").as_uri().encode(),
                 b"data:image/png;base64," + base64.b64encode(make_image(2)), server.url("/ok.png")]
        images = await reader(settings).read(items)
        assert server.seen == [f"images.example:{server.port}"] * 3
    assert [image.pixels.size for image in images] == [(28, 28), (112, 84), (28, 28), (112, 84), (112, 84)]
    assert [image.content_id for image in images] == [content_id(PNG), content_id(make_image(1)), content_id(PNG),
                                                      content_id(make_image(2)), content_id(make_image(1))]
    assert {image.pixels.mode for image in images} == {"RGB"}


@pytest.mark.parametrize(("path", "words"), [
    ("/large.png", "TANDEM_IMAGE_MAX_BYTES"), ("/endless.png", "TANDEM_IMAGE_MAX_BYTES"), ("/text.html", "not an image"),
    ("/absent.png", "HTTP 404"), ("/busy.png", "HTTP 503: retry"), ("/loop.png", f"more than {MAX_REDIRECTS} redirects"),
    ("/zipped.png", "compressed"),
])  # fmt: skip
async def test_what_a_server_answers_instead_of_an_image_is_an_error(path: str, words: str) -> None:
    """Each its own, and nothing stays open."""
    async with site() as server:
        with pytest.raises(RequestError, match=words):
            await reader().read([server.url(path)])


async def test_a_slow_server_ends_with_the_deadline() -> None:
    """As the request's own error: UNAVAILABLE would make routers leave this worker alone."""
    hasty = replace(OPEN, image_timeout_s=0.2, image_max_bytes=1 << 20)
    async with site() as server:
        with pytest.raises(RequestError, match="TANDEM_IMAGE_TIMEOUT_S") as caught:
            await reader(hasty).read([server.url("/ok.png"), server.url("/slow.png")])
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


async def test_a_private_address_is_refused_before_anything_is_sent() -> None:
    """By its number or by a name, behind a redirect, and if only one of a name's addresses is private."""
    closed = replace(OPEN, image_allow_private=False)
    async with site() as server:
        for names in (_names, resolve):
            for host in ("127.0.0.1", "localhost", "2130706433", "[::1]"):
                with pytest.raises(RequestError, match="not public"):
                    await reader(closed, names).read([server.url("/ok.png", host)])
        assert server.seen == []

        async def public_once(host: str, _port: int) -> list[str]:
            return ["127.0.0.1"] if host == "images.example" else ["8.8.8.8", "10.0.0.1"]

        with pytest.raises(RequestError, match="not public"):
            await reader(closed, public_once).read([server.url("/ok.png", "inside.example")])
        assert server.seen == []


async def test_a_redirect_is_checked_like_the_first_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """A public server can't lead a worker inside."""
    async with site() as server:
        monkeypatch.setattr("tandem_worker.images.fetch.is_public", lambda address: address != "10.0.0.1")
        with pytest.raises(RequestError, match="not public"):
            await reader(replace(OPEN, image_allow_private=False)).read([server.url("/inside.png")])
        assert server.seen == [f"images.example:{server.port}"]
        with pytest.raises(RequestError, match="TANDEM_IMAGE_HOSTS"):
            await reader(replace(OPEN, image_hosts=("images.example",))).read([server.url("/inside.png")])


async def test_a_name_is_resolved_once_for_a_hop() -> None:
    """And that address is connected to: a second answer of another kind would come too late."""
    asked: list[str] = []

    async def changing(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["192.0.2.1"]

    async with site() as server:
        images = await reader(replace(OPEN, image_max_bytes=1 << 20), changing).read([server.url("/ok.png")])
    assert len(images) == 1
    assert asked == ["images.example"]


async def test_an_unknown_host_and_a_dead_port_are_errors() -> None:
    """Of the request."""
    with pytest.raises(RequestError, match="not known"):
        await reader().read([b"http://unknown.example/a.png"])
    async with site() as server:
        url = server.url("/ok.png")
    with pytest.raises(RequestError, match="can't be fetched"):
        await reader().read([url])


async def test_files_are_read_only_below_the_allowed_folder(tmp_path: Path) -> None:
    """A link out of it doesn't help, and without the setting no file is read at all."""
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(RequestError, match="TANDEM_IMAGE_ROOT"):
        await reader().read([(tmp_path / "secret.png").as_uri().encode()])
    for path in (tmp_path / "secret.png", root / "link.png", root / "absent.png", root / ".." / "secret.png"):
        with pytest.raises(RequestError, match="no image file"):
            await reader(replace(OPEN, image_root=str(root))).read([f"file://{path}".encode()])


async def test_a_request_has_bounds_of_count_bytes_and_pixels() -> None:
    """Over all of its images together; pixels are counted before any is decoded."""
    item = base64.b64encode(PNG)
    with pytest.raises(RequestError, match="TANDEM_IMAGE_MAX_COUNT"):
        await reader(replace(OPEN, image_max_count=2)).read([item] * 3)
    with pytest.raises(RequestError, match="TANDEM_IMAGE_MAX_BYTES"):
        await reader(replace(OPEN, image_max_bytes=2 * len(PNG) - 1)).read([item] * 2)
    with pytest.raises(RequestError, match="TANDEM_IMAGE_MAX_PIXELS"):
        await reader(replace(OPEN, image_max_pixels=2 * 28 * 28 - 1, image_max_bytes=1 << 20)).read([item] * 2)


@pytest.mark.parametrize("data", [PNG[:-300], PNG[:60], b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                                  b"\xff\xd8\xff\xe0"])
async def test_truncated_files_and_other_formats_are_the_clients_error(data: bytes) -> None:
    """Never an internal one."""
    with pytest.raises(RequestError, match="image"):
        await reader().read([base64.b64encode(data)])


async def test_one_bad_image_ends_the_others(tmp_path: Path) -> None:
    """The request fails with the error of the bad one at once, and not after the deadline of the slow one."""
    async with site() as server:
        with pytest.raises(RequestError, match="HTTP 404"):
            await asyncio.wait_for(reader().read([server.url("/slow.png"), server.url("/absent.png")]), 3)


async def test_a_cancelled_request_leaves_no_connection() -> None:
    """Its turn is free for the next."""
    one = reader(replace(OPEN, image_concurrency=1, image_max_bytes=1 << 20))
    async with site() as server:
        task = asyncio.create_task(one.read([server.url("/slow.png")]))
        await asyncio.wait_for(server.asked.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(await asyncio.wait_for(one.read([server.url("/ok.png")]), 5)) == 1
    one.close()
