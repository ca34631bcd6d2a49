# SPDX-License-Identifier: Apache-2.0
"""Adapters before they reach an engine: names, sources, files, archives, copies."""

import http.server
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from adapters import BAD, CONFIG_FILE, HIDDEN, LAYERS, MAX_RANK, WEIGHTS_FILE, make_adapter, pack, tensors_of, write_adapter
from s3s import KEYS, Mood, Proxy, s3_server
from tandem_protocol.errors import ConfigError, RequestError, UnavailableError
from tandem_worker.lora.adapter import check_name, lora_id, static_adapters
from tandem_worker.lora.checks import Fit, check_folder
from tandem_worker.lora.deadline import Deadline
from tandem_worker.lora.fetch import Fetcher
from tandem_worker.lora.hub import HubFiles
from tandem_worker.lora.s3 import S3Files, S3Place
from tandem_worker.lora.source import Kind, parse_source
from tandem_worker.lora.store import CopyStore
from tandem_worker.lora.weights import Tensor, base_shapes, read_header

BASE = {f"model.layers.{layer}.self_attn.{module}.weight": Tensor("F32", (HIDDEN, HIDDEN), 0, 0)
        for layer in range(LAYERS) for module in ("q_proj", "v_proj")}
WAIT_S = 30.0
NOWHERE = S3Files(S3Place("http://127.0.0.1:1", "us-east-1", allow_http=True))


def fetcher(folder: Path, *, max_bytes: int = 10**8, bucket: S3Files = NOWHERE, hub: str = "http://127.0.0.1:1") -> Fetcher:
    """Fetches from `folder` into `folder/copies`."""
    return Fetcher(CopyStore(folder / "copies"), (folder.resolve(),), max_bytes, Fit(MAX_RANK, BASE), bucket, HubFiles(hub))


def fetch(made: Fetcher, uri: str, deadline: Deadline | None = None) -> Path:
    """Where the copy is; it is held until the process ends."""
    return made.fetch(parse_source(uri), deadline or Deadline(WAIT_S)).path


def left_over(folder: Path) -> list[str]:
    """What is in the copies' folder besides locks."""
    return [path.name for path in folder.glob("copies/tandem/*") if path.suffix != ".lock"]


def test_the_number_of_a_name_is_dynamos() -> None:
    """Source: the test of Dynamo's `lora_name_to_id`."""
    assert lora_id("test_lora") == 1983627077
    assert 1 <= lora_id("x") < 2**31


@pytest.mark.parametrize("name", ["", None, 3, "a b", "../x", "-x", "a" * 129, "x\n", "a?b"])
def test_names_that_are_refused(name: object) -> None:
    """They go into URLs, logs and metrics."""
    with pytest.raises(RequestError, match="lora_name"):
        check_name(name)


def test_names_of_a_hub_are_fine() -> None:
    """With a slash."""
    assert check_name("org/adapter-1.0_b:v2") == "org/adapter-1.0_b:v2"


@pytest.mark.parametrize(
    ("uri", "kind", "place", "path", "archive"),
    [("file:///a/b", Kind.FILE, "", "/a/b", False), ("file://localhost/a%20b.tar.gz", Kind.FILE, "", "/a b.tar.gz", True),
     ("s3://bucket/a/b/", Kind.S3, "bucket", "a/b", False), ("s3://bucket/a.zip", Kind.S3, "bucket", "a.zip", True),
     ("hf://org/name", Kind.HUB, "org/name", "main", False), ("hf://org/name@v1.0", Kind.HUB, "org/name", "v1.0", False)],
)
def test_sources(uri: str, kind: Kind, place: str, path: str, archive: bool) -> None:
    """What a URI means."""
    source = parse_source(uri)
    assert (source.kind, source.place, source.path, source.is_archive) == (kind, place, path, archive)


@pytest.mark.parametrize(
    "uri", [None, 3, "", "/a/b", "http://host/a", "file://host/a", "file:a", "s3://bucket", "s3://B_/a", "s3://bucket/a/../../b", "hf://name",
            "hf://org/name/more", "hf://org/..", "hf://org/name@-x", "file:///a?b=c", "file:///a%00b", "s3://[", "x" * 3000],
)
def test_sources_that_are_refused(uri: object) -> None:
    """With a sentence, never with another error."""
    with pytest.raises(RequestError):
        parse_source(uri)


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    """And leave nothing behind."""
    bad = BAD[name]
    with pytest.raises(RequestError, match=bad.reason):
        fetch(fetcher(tmp_path), f"file://{bad.make(tmp_path)}")
    assert left_over(tmp_path) == []
    assert not Path("/tmp/escaped").exists()


def test_a_good_adapter_is_copied_under_its_contents(tmp_path: Path) -> None:
    """Folder and archives of the same files are one copy; other weights are another."""
    made, first = fetcher(tmp_path), make_adapter(tmp_path / "first")
    copy = fetch(made, f"file://{first}")
    assert (copy / WEIGHTS_FILE).read_bytes() == (first / WEIGHTS_FILE).read_bytes()
    assert fetch(made, f"file://{pack(first, tmp_path / 'a.tar.gz')}") == copy
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in first.iterdir():
            archive.write(file, file.name)
    assert fetch(made, f"file://{tmp_path / 'a.zip'}") == copy
    assert fetch(made, f"file://{make_adapter(tmp_path / 'second', seed=2)}") != copy


def test_a_zip_with_a_link_is_refused(tmp_path: Path) -> None:
    """Its kind is in the upper half of the external attributes."""
    link = zipfile.ZipInfo(WEIGHTS_FILE)
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(RequestError, match="link or device"):
        fetch(fetcher(tmp_path), f"file://{tmp_path / 'a.zip'}")


def test_an_archive_that_grows_is_stopped(tmp_path: Path) -> None:
    """What comes out counts, not what went in."""
    write_adapter(tmp_path / "big", {name: values * 0 for name, values in tensors_of(hidden=1024, rank=16).items()})
    archive = pack(tmp_path / "big", tmp_path / "a.tar.gz")
    assert archive.stat().st_size < 100_000
    with pytest.raises(RequestError, match="TANDEM_LORA_MAX_GB"):
        fetch(fetcher(tmp_path, max_bytes=100_000), f"file://{archive}")
    assert left_over(tmp_path) == []


def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    """By the load's own deadline; the clock is read at each piece."""
    times = iter((0.0, 5.0, 11.0, 12.0))
    with pytest.raises(UnavailableError, match="within 10 s"):
        fetch(fetcher(tmp_path), f"file://{make_adapter(tmp_path / 'a')}", Deadline(10.0, clock=lambda: next(times)))
    assert left_over(tmp_path) == []


def test_a_worker_that_stops_gives_up(tmp_path: Path) -> None:
    """At once."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(UnavailableError, match="shutting down"):
        fetch(fetcher(tmp_path), f"file://{make_adapter(tmp_path / 'a')}", Deadline(WAIT_S, stop))


def test_a_copy_lives_as_long_as_anybody_holds_it(tmp_path: Path) -> None:
    """Two workers of a host share it; the last one removes it; a sweep leaves those that are held."""
    source = parse_source(f"file://{make_adapter(tmp_path / 'a')}")
    one, other = fetcher(tmp_path), fetcher(tmp_path)
    first, second = one.fetch(source, Deadline(WAIT_S)), other.fetch(source, Deadline(WAIT_S))
    assert first.path == second.path
    one.release(first)
    assert (other.store.sweep(), second.path.is_dir()) == (0, True)
    other.release(second)
    assert list(second.path.parent.iterdir()) == []


def test_what_a_killed_worker_left_is_swept(tmp_path: Path) -> None:
    """Its locks ended with it."""
    made = fetcher(tmp_path)
    copy = made.fetch(parse_source(f"file://{make_adapter(tmp_path / 'a')}"), Deadline(WAIT_S))
    os.close(copy.lock)
    stale = copy.path.parent / "staging-old"
    stale.mkdir()
    os.utime(stale, (0, 0))
    assert made.store.sweep() == 1
    assert list(copy.path.parent.iterdir()) == []


def test_a_damaged_copy_is_not_used(tmp_path: Path) -> None:
    """The engine would read it."""
    made = fetcher(tmp_path)
    uri = f"file://{make_adapter(tmp_path / 'a')}"
    (fetch(made, uri) / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(UnavailableError, match="is damaged"):
        fetch(made, uri)


def test_a_source_may_change_afterwards(tmp_path: Path) -> None:
    """The copy stays as it is."""
    folder = make_adapter(tmp_path / "a")
    copy = fetch(fetcher(tmp_path), f"file://{folder}")
    before = (copy / WEIGHTS_FILE).read_bytes()
    make_adapter(folder, seed=9)
    assert (copy / WEIGHTS_FILE).read_bytes() == before


def test_modules_of_a_quantized_base_are_left_to_the_engine(tmp_path: Path) -> None:
    """Its tensors have other names or shapes; single ranks per module are fine, too."""
    base = {name.replace(".weight", ".qweight"): tensor for name, tensor in BASE.items()}
    check_folder(make_adapter(tmp_path / "a"), Fit(MAX_RANK, base))
    check_folder(write_adapter(tmp_path / "b", tensors_of(rank=2), rank_pattern={"q_proj": 2, "v_proj": 2}), Fit(MAX_RANK, BASE))


def test_the_shapes_of_a_model_folder(tmp_path: Path) -> None:
    """Of all its files; nothing of a folder without safetensors, or none at all."""
    write_adapter(tmp_path, tensors_of())
    assert base_shapes(tmp_path) == read_header(tmp_path / WEIGHTS_FILE)
    assert base_shapes(tmp_path / "none") == {}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinities_are_seen_in_every_width(tmp_path: Path, dtype: type, value: float) -> None:
    """By their exponents."""
    tensors = {name: values.astype(dtype) for name, values in tensors_of().items()}
    check_folder(write_adapter(tmp_path / "good", tensors), Fit(MAX_RANK, BASE))
    next(iter(tensors.values()))[-1, -1] = value
    with pytest.raises(RequestError, match="infinities or NaNs"):
        check_folder(write_adapter(tmp_path / "bad", tensors), Fit(MAX_RANK, BASE))


def test_multi_lora_json(tmp_path: Path) -> None:
    """Listed under the same numbers as those that are loaded; a broken file stops the start."""
    assert static_adapters(tmp_path) == ()
    (tmp_path / "multi_lora.json").write_text('{"doll": "/models/doll"}')
    (adapter,) = static_adapters(tmp_path)
    assert (adapter.name, adapter.id, adapter.path, adapter.uri) == ("doll", lora_id("doll"), "/models/doll", "/models/doll")
    for broken in ("[]", "{", '{"doll": ""}'):
        (tmp_path / "multi_lora.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"multi_lora\.json"):
            static_adapters(tmp_path)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """In front of a real S3 endpoint with the bucket `loras`, which has a folder `a` and an archive `a.tgz`."""
    folder = tmp_path_factory.mktemp("s3")
    with s3_server(folder) as s3:
        s3.make_bucket("loras")
        source = make_adapter(folder / "a")
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            s3.client().upload_file(str(source / name), "loras", f"a/{name}")
        s3.client().upload_file(str(pack(source, folder / "a.tgz")), "loras", "a.tgz")
        proxy = Proxy(s3.port)
        yield proxy
        proxy.close()


@pytest.fixture
def bucket(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> S3Files:
    """The bucket's files, with the endpoint's keys in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS["access_key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS["secret_key"])
    proxy.mood = Mood.GOOD
    return S3Files(S3Place(proxy.url, KEYS["region"], allow_http=True))


def test_from_a_bucket(bucket: S3Files, tmp_path: Path) -> None:
    """Folder and archive are the same adapter."""
    made = fetcher(tmp_path, bucket=bucket)
    assert fetch(made, "s3://loras/a") == fetch(made, "s3://loras/a.tgz")


@pytest.mark.parametrize("uri", ["s3://loras/b", "s3://loras/b.tgz", "s3://nobody/a"])
def test_what_a_bucket_does_not_have(bucket: S3Files, tmp_path: Path, uri: str) -> None:
    """Is refused, not tried again."""
    with pytest.raises(RequestError, match="there is no s3://"):
        fetch(fetcher(tmp_path, bucket=bucket), uri)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("mood", [Mood.DOWN, Mood.BUSY, Mood.SILENT, Mood.TRICKLE])
def test_a_bad_network_costs_a_bounded_time(bucket: S3Files, proxy: Proxy, tmp_path: Path, mood: Mood) -> None:
    """Whatever it does; nothing is left behind."""
    proxy.mood = mood
    with pytest.raises(UnavailableError):
        fetch(fetcher(tmp_path, bucket=bucket), "s3://loras/a", Deadline(1.0))
    proxy.mood = Mood.GOOD
    assert left_over(tmp_path) == []


def test_http_has_to_be_allowed(tmp_path: Path) -> None:
    """Keys would travel in the open."""
    with pytest.raises(RequestError, match="AWS_ALLOW_HTTP"):
        fetch(fetcher(tmp_path, bucket=S3Files(S3Place("http://127.0.0.1:1", "us-east-1", allow_http=False))), "s3://loras/a")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A server with the files of org/name at revision v1, as a hub lays them out."""
    make_adapter(tmp_path / "hub" / "org" / "name" / "resolve" / "v1")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path / "hub"))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(WAIT_S)
    server.server_close()


def test_from_a_hub(hub: str, tmp_path: Path) -> None:
    """By name and revision; what it doesn't have is refused."""
    made = fetcher(tmp_path, hub=hub)
    assert (fetch(made, "hf://org/name@v1") / WEIGHTS_FILE).is_file()
    with pytest.raises(RequestError, match="has no adapter_config"):
        fetch(made, "hf://org/name@v2")


def test_without_a_hub_there_is_a_sentence(tmp_path: Path) -> None:
    """It says where else adapters can come from."""
    with pytest.raises(UnavailableError, match=r"can't be reached .*file://"):
        fetch(fetcher(tmp_path), "hf://org/name")
