# SPDX-License-Identifier: Apache-2.0
"""Adapters loaded into a running engine, from disk and from S3, by HTTP and by `tandem lora`; used directly and through the router."""

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from adapters import BAD, make_adapter, unsupported_module
from calls import Call, collect, connect, text_of
from s3s import KEYS, S3, s3_server
from servers import Server, get_json, post_json, serve, tandem, wait_for
from tandem_cli.route import QUERY
from tandem_worker.lora.adapter import CONFIG_FILE, WEIGHTS_FILE, lora_id

pytestmark = pytest.mark.slow
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
WAIT_S = 30.0
LONG_PROMPT = list(range(1000, 1100))
"""Three full blocks of 32."""


@dataclass(frozen=True)
class Site:
    """A server with one worker, and what it loads adapters from."""

    server: Server
    folder: Path
    s3: S3

    @property
    def loras_url(self) -> str:
        """Of the worker's admin port."""
        return f"{self.server.admin_url('vllm')}/v1/loras"

    def load(self, name: str, uri: str) -> dict[str, Any]:
        """The answer, whatever it is."""
        return dict(post_json(self.loras_url, {"lora_name": name, "source": {"uri": uri}}))

    def unload(self, name: str) -> dict[str, Any]:
        """The answer, which must be a success."""
        request = urllib.request.Request(f"{self.loras_url}/{name}", method="DELETE")
        with urllib.request.urlopen(request, timeout=60) as response:
            return dict(json.loads(response.read()))

    @property
    def listed(self) -> dict[str, int]:
        """Name -> number."""
        return dict(get_json(self.loras_url)["loras"])

    @property
    def copies(self) -> list[Path]:
        """Folders that the engine may read."""
        return [path for path in (self.folder / "copies" / "tandem").glob("*") if path.is_dir()]

    async def text(self, lora: str | None = None, model: str = "vllm") -> str:
        """The answer to a short prompt."""
        async with connect(self.server.grpc_url) as client:
            return await text_of(client, Call(model, prompt="Hello there", sampling={**GREEDY, "lora_name": lora}))

    async def cached(self, lora: str | None = None) -> int:
        """How many tokens of the long prompt the engine found in its cache."""
        async with connect(self.server.grpc_url) as client:
            call = Call("vllm", prompt=LONG_PROMPT, sampling={**GREEDY, "max_tokens": 1, "lora_name": lora}, returns=("num_cached_tokens",))
            return int((await collect(client, call))[-1]["num_cached_tokens"][0])

    async def predicted(self, lora: str | None = None) -> int:
        """How many the router expects to be there."""
        async with connect(self.server.grpc_url) as client:
            text = await text_of(client, Call("router", prompt=LONG_PROMPT, sampling={"lora_name": lora}, parameters=QUERY))
        return int(json.loads(text)["worker"]["cached_tokens"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Site]:
    """The tiny model in float32, with two adapters at a time on the device."""
    folder = tmp_path_factory.mktemp("lora")
    with s3_server(folder) as s3:
        environment = {
            "DYN_LORA_ENABLED": "true", "DYN_LORA_PATH": str(folder / "copies"), "TANDEM_LORA_ROOTS": str(folder), "AWS_ENDPOINT": s3.url,
            "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": KEYS["access_key"], "AWS_SECRET_ACCESS_KEY": KEYS["secret_key"],
        }
        options = ["--mode", "agg", "--model", str(tiny_model), "--dtype", "float32", "--max-model-len", "1024", "--max-loras", "2",
                   "--max-lora-rank", "8"]
        with serve(folder / "run", *options, **environment) as server:
            yield Site(server, folder, s3)


@pytest.fixture
def loaded(site: Site) -> Iterator[Callable[..., str]]:
    """Loads an adapter of a seed under a name, from disk, and unloads it after the test."""
    names: list[str] = []

    def load(name: str, seed: int) -> str:
        names.append(name)
        answer = site.load(name, f"file://{make_adapter(site.folder / f'seed{seed}', seed)}")
        assert answer["status"] == "success", answer
        return name

    yield load
    for name in site.listed.keys() & names:
        site.unload(name)
    assert site.copies == []


async def test_an_adapter_changes_the_text_until_it_is_unloaded(site: Site, loaded: Callable[..., str]) -> None:
    """And then its name is refused in vllm_backend's words; the base model's text is the same before, meanwhile and after."""
    plain = await site.text()
    loaded("fr", 1)
    assert site.listed == {"fr": lora_id("fr")}
    adapted = await site.text("fr")
    assert adapted != plain
    assert await site.text() == plain
    site.unload("fr")
    with pytest.raises(InferenceServerException, match=r"LoRA fr is not supported, we currently support \[\]"):
        await site.text("fr")
    assert await site.text() == plain


async def test_from_a_bucket_it_is_the_same(site: Site, loaded: Callable[..., str]) -> None:
    """As from disk."""
    site.s3.make_bucket("loras")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        site.s3.client().upload_file(str(make_adapter(site.folder / "seed1") / name), "loras", f"fr/{name}")
    assert site.load("bucket", "s3://loras/fr")["status"] == "success"
    assert await site.text("bucket") == await site.text(loaded("fr", 1)) != await site.text()
    site.unload("bucket")


async def test_a_name_given_to_other_weights_has_their_text(site: Site, loaded: Callable[..., str]) -> None:
    """So the engine really gave the first ones up; and it has none of their blocks."""
    first = await site.text(loaded("fr", 1))
    await site.cached("fr")
    assert await site.cached("fr") > 0
    site.unload("fr")
    second = await site.text(loaded("fr", 2))
    assert second != first
    assert await site.cached("fr") == 0


async def test_more_adapters_than_fit_on_the_device(site: Site, loaded: Callable[..., str]) -> None:
    """vLLM evicts and reads again, from our copies: the sources are gone by then."""
    texts = {name: await site.text(loaded(name, seed)) for seed, name in enumerate(("a", "b", "c", "d"), start=1)}
    assert len(set(texts.values())) == 4
    for seed in range(1, 5):
        (site.folder / f"seed{seed}" / WEIGHTS_FILE).unlink()
    assert {name: await site.text(name) for name in texts} == texts


def test_concurrent_loads_of_one_name_load_once(site: Site, loaded: Callable[..., str]) -> None:
    """By the worker's own count."""
    uri = f"file://{make_adapter(site.folder / 'seed1')}"

    def count() -> dict[str, float]:
        lines = urllib.request.urlopen(f"{site.server.admin_url('vllm')}/metrics", timeout=10).read().decode().splitlines()
        return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("tandem_lora_loads_total{")}

    before = count()
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: site.load("fr", uri), range(12)))
    assert [answer["status"] for answer in answers] == ["success"] * 12
    after = count()
    assert (after["loaded"] - before["loaded"], after["present"] - before["present"]) == (1, 11)
    site.unload("fr")


async def test_bad_adapters_disturb_nothing(site: Site, loaded: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """All of them, and one that only vLLM can refuse: each with its reason, and an adapter in use goes on as before."""
    expected = await site.text(loaded("fr", 1))
    for number, (name, bad) in enumerate(BAD.items()):
        folder = site.folder / f"bad{number}"
        folder.mkdir()
        answer = site.load("bad", f"file://{bad.make(folder)}")
        assert answer["status"] == "error", name
    refused = site.load("bad", f"file://{unsupported_module(site.folder / 'unsupported')}")
    assert refused["status"] == "error"
    assert "input_layernorm" in refused["message"]
    assert (site.listed, len(site.copies)) == ({"fr": lora_id("fr")}, 1)
    assert await site.text("fr") == expected


def test_prefix_hits_never_cross_adapters(site: Site, loaded: Callable[..., str]) -> None:
    """Neither in the engine, nor in what the router expects of it."""
    users = (None, loaded("a", 1), loaded("b", 2))
    for user in users:
        assert [asyncio.run(site.cached(user)) for _ in range(2)] == [0, 96]
    wait_for(lambda: {"a", "b"} <= {*_fleet_loras(site)}, WAIT_S, "the router knows both adapters")
    for user in users:
        wait_for(lambda user=user: asyncio.run(site.predicted(user)) == 96, WAIT_S, f"the router knows the blocks of {user}")
    site.unload("a")
    loaded("c", 3)
    wait_for(lambda: "c" in _fleet_loras(site), WAIT_S, "the router knows the new adapter")
    assert asyncio.run(site.predicted("c")) == 0


async def test_the_router_sends_requests_to_who_has_the_adapter(site: Site, loaded: Callable[..., str]) -> None:
    """It learns of loads and unloads from discovery; nobody has it: the sentence says what to do."""
    adapted = await site.text(loaded("fr", 1))
    wait_for(lambda: _fleet_loras(site) == ["fr"], WAIT_S, "the router knows the adapter")
    assert await site.text("fr", model="router") == adapted
    site.unload("fr")
    wait_for(lambda: _fleet_loras(site) == [], WAIT_S, "the router knows that it is gone")
    with pytest.raises(InferenceServerException, match=r"is on no worker: load it with POST /v1/loras"):
        await site.text("fr", model="router")


def test_the_command_loads_lists_and_unloads(site: Site) -> None:
    """On all workers of a server; a failure is an exit code."""
    admin_port = site.server.admin_url("vllm").rsplit(":", 1)[1]
    options = ["--url", site.server.grpc_url, "--admin-port", admin_port]
    uri = f"file://{make_adapter(site.folder / 'seed1')}"
    loaded = tandem(site.server.run_dir, "lora", "load", "fr", uri, *options)
    assert (loaded.returncode, loaded.stdout) == (0, "vllm: LoRA adapter 'fr' loaded successfully\n")
    listed = json.loads(tandem(site.server.run_dir, "lora", "list", "--json", *options).stdout)
    assert [worker["loras"] for worker in listed["workers"]] == [{"fr": lora_id("fr")}]
    assert tandem(site.server.run_dir, "lora", "unload", "fr", *options).returncode == 0
    again = tandem(site.server.run_dir, "lora", "unload", "fr", *options)
    assert (again.returncode, "is not loaded" in again.stdout) == (1, True)
    assert site.copies == []


async def test_prefill_and_decode_with_an_adapter(tmp_path: Path, tiny_model: Path) -> None:
    """Loaded on all three workers by one command; the pair's text is the aggregated worker's."""
    environment = {"DYN_LORA_ENABLED": "true", "DYN_LORA_PATH": str(tmp_path / "copies"), "TANDEM_LORA_ROOTS": str(tmp_path)}
    options = ["--model", str(tiny_model), "--dtype", "float32", "--max-model-len", "1024"]
    with serve(tmp_path / "run", *options, **environment) as server:
        admin_port = server.admin_url("vllm").rsplit(":", 1)[1]
        uri = f"file://{make_adapter(tmp_path / 'fr')}"
        load = tandem(server.run_dir, "lora", "load", "fr", uri, "--url", server.grpc_url, "--admin-port", admin_port)
        assert (load.returncode, load.stdout.count("loaded successfully")) == (0, 3)
        async with connect(server.grpc_url) as client:
            texts = {(model, lora): await text_of(client, Call(model, prompt="Hello there", sampling={**GREEDY, "lora_name": lora}))
                     for model in ("vllm", "disagg") for lora in (None, "fr")}
    assert texts["disagg", "fr"] == texts["vllm", "fr"] != texts["vllm", None] == texts["disagg", None]


def _fleet_loras(site: Site) -> list[str]:
    fleet = get_json(f"{site.server.state['router_urls'][0]}/fleet")
    return [name for worker in fleet["workers"] for name in worker.get("loras", ())]
