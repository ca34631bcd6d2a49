# SPDX-License-Identifier: Apache-2.0
"""The GPU run of speculative decoding, over stand-in servers: when two texts are the same, and what passes."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from benchmarks.errors import BenchmarkError
from benchmarks.gpu import speculation as bench
from benchmarks.gpu.greedy_texts import Difference, Reference, differences
from benchmarks.gpu.speculation_cases import Case, Guesses, Outcome, cases, prompts
from benchmarks.gpu.speculation_head import VOCABULARY, make_eagle3_head
from safetensors.numpy import load_file

from fakes import WAIT_S
from tandem_cli.serve.run_state import RunState
from tandem_protocol.admin_site import AdminSite

TOKENS = 6
GUESSED = 4
CASES = cases("/models/draft", "/models/head", GUESSED)


@dataclass
class StubServers:
    """Any number of servers in one: a front like Triton's, and counters that move with every answer."""

    accepted_per_draft: int = 4
    spoiled: str = ""
    """A case whose third token is another one."""
    broken: str = ""
    """A case whose server does not start."""
    started: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    drafts: int = 0
    padded: int = 0
    """Steps after a handoff, which vLLM counts as refused guesses."""

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "StubServers":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._site.stop(), self._loop).result(WAIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    @contextmanager
    def serving(self, case: Case, _: int) -> Iterator[RunState]:
        """As `served` does it."""
        self.started.append(case.name)
        if case.name == self.broken:
            raise BenchmarkError("it ended while starting")
        self._answering = case
        admin = dict.fromkeys(("vllm", "decode"), f"http://127.0.0.1:{self._port}")
        yield RunState("run", 1, 0.0, self._port, 0, 0, models=(), admin_urls=admin)
        self.stopped.append(case.name)

    async def _open(self) -> None:
        app = web.Application()
        app.add_routes([web.post("/v2/models/{model}/generate", self._generate), web.get("/metrics", self._metrics)])
        self._site = AdminSite(app)
        self._port = await self._site.start("127.0.0.1", 0, "")

    async def _generate(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        sampling = json.loads(body["sampling_parameters"])
        self.drafts += 1
        self.padded += self._answering.padding > 0
        ids = list(range(sampling["max_tokens"]))
        if self._answering.name == self.spoiled:
            ids[2] = 99
        steps = [{token: {"logprob": -0.1}, token + 1: {"logprob": -3.0}} for token in ids]
        return web.json_response({"text_output": "x", "output_ids": ids, "logprobs": json.dumps(steps) if body["return_logprobs"] else ""})

    async def _metrics(self, _: web.Request) -> web.Response:
        steps = self.drafts + self.padded
        counts = {"drafts": steps, "draft_tokens": GUESSED * steps, "accepted_tokens": self.accepted_per_draft * self.drafts}
        lines = [f'vllm:spec_decode_num_{name}_total{{engine="0"}} {count}.0\n' for name, count in counts.items()]
        return web.Response(text="".join([*lines, 'vllm:spec_decode_num_drafts_created{engine="0"} 17.0\n']))


def run(servers: StubServers, *names: str) -> dict[str, Any]:
    """The report of these cases, one server at a time."""
    comparison = bench.Comparison(prompts(4), TOKENS)
    bench.one_by_one([CASES[name] for name in names], servers.serving, comparison)
    return comparison.report()


@pytest.fixture
def servers() -> Iterator[StubServers]:
    """Servers that answer all alike and accept every guess."""
    with StubServers() as running:
        yield running


def test_equal_texts_and_accepted_guesses_pass(servers: StubServers) -> None:
    """With the accept length, the acceptance, and the speed beside the plain engine's."""
    report = run(servers, "plain", "ngram", "draft_model", "disagg")
    assert report["passed"], report
    plain, _, draft, disagg = report["cases"]
    assert (plain["guesses"], plain["times_plain"], plain["output_tokens"]) == (None, 1.0, 4 * TOKENS)
    assert (draft["guesses"]["accept_length"], draft["guesses"]["acceptance"], draft["guesses"]["drafts"]) == (5.0, 1.0, 4)
    assert (disagg["case"], disagg["guesses"]) == ("disagg", draft["guesses"])
    assert servers.stopped == ["plain", "ngram", "draft_model", "disagg"]


def test_another_text_fails(servers: StubServers) -> None:
    """Where it parts from the reference is told."""
    servers.spoiled = "ngram"
    report = run(servers, "plain", "ngram")
    assert not report["passed"]
    assert report["cases"][1]["differing"] == [
        {"prompt": prompt, "position": 2, "gap": None, "is_tie": False} for prompt in range(4)]


def test_a_draft_that_is_refused_too_often_fails(servers: StubServers) -> None:
    """Half of the guesses are few for a draft that is the target itself, and enough for n-grams."""
    servers.accepted_per_draft = 2
    report = run(servers, "plain", "ngram", "draft_model")
    assert [case["passed"] for case in report["cases"]] == [True, True, False]


def test_random_guesses_need_only_be_made(servers: StubServers) -> None:
    """Those of a head with random weights; of guesses by n-grams one must come true."""
    servers.accepted_per_draft = 0
    report = run(servers, "plain", "eagle3", "disagg_eagle3", "ngram")
    assert [case["passed"] for case in report["cases"]] == [True, True, True, False]
    assert [case["guesses"]["acceptance"] for case in report["cases"][1:]] == [0.0] * 3
    assert not Outcome("eagle3", 10, 1.0, Guesses(0, 0, 0), None, ()).passed


def test_a_random_head_fits_its_target(tmp_path: Path) -> None:
    """Its shapes follow the target's configuration; one seed makes the same one again, another one another."""
    target = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1,
              "head_dim": 8, "vocab_size": 3 * VOCABULARY, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(target))
    first, again, other = (make_eagle3_head(tmp_path, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    config = json.loads((first / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    tensors = load_file(first / "model.safetensors")
    assert tensors["fc.weight"].shape == (24, 72)
    assert tensors["midlayer.self_attn.k_proj.weight"].shape == (8, 48)
    assert tensors["lm_head.weight"].shape == (VOCABULARY, 24)
    guessed = tensors["d2t"] + np.arange(VOCABULARY)
    assert guessed.tolist() == np.flatnonzero(tensors["t2d"]).tolist()
    weights = [load_file(folder / "model.safetensors")["fc.weight"] for folder in (first, again, other)]
    assert (weights[0] == weights[1]).all()
    assert not (weights[0] == weights[2]).all()


def test_a_server_that_does_not_start_costs_its_case(servers: StubServers) -> None:
    """The others are measured, and the report says why it failed."""
    servers.broken = "ngram"
    report = run(servers, "plain", "ngram", "draft_model")
    assert not report["passed"]
    assert report["errors"] == {"ngram": "it ended while starting"}
    assert [case["case"] for case in report["cases"]] == ["plain", "draft_model"]


def test_servers_of_a_gpu_are_started_together_and_all_stopped(servers: StubServers) -> None:
    """Also when one of them does not start."""
    servers.broken = "ngram"
    comparison = bench.Comparison(prompts(2), TOKENS)
    bench.together([CASES[name] for name in ("plain", "ngram", "draft_model")], servers.serving, comparison)
    assert sorted(servers.started) == ["draft_model", "ngram", "plain"]
    assert sorted(servers.stopped) == ["draft_model", "plain"]
    assert set(comparison.errors) == {"ngram"}


def test_only_a_choice_between_equally_likely_tokens_is_a_tie() -> None:
    """The tokens before it are the same, and what follows is not judged."""
    reference = Reference((5, 6, 7), ({5: -0.1}, {6: -0.7, 8: -0.7005}, {7: -0.1}))
    tie, other, short = differences([reference] * 3, [(5, 8, 1), (5, 9, 7), (5, 6)])
    assert tie == Difference(0, 1, pytest.approx(0.0005))
    assert (tie.is_tie, other.is_tie, short.is_tie) == (True, False, False)
    assert (other.position, short.position) == (1, 2)
    assert differences([reference], [(5, 6, 7)]) == []


def test_without_guesses_nothing_is_divided() -> None:
    """A speculating engine that never guessed has failed."""
    none = Guesses(0, 0, 0)
    assert (none.acceptance, none.accept_length) == (0.0, 1.0)
    assert not Outcome("ngram", 10, 1.0, none, 0.0, ()).passed
