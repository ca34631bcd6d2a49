# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: the text stays the same, guesses come true and are counted, and prefill and decode are paired only if they agree.

Real engines, prefill and decode, with n-grams, in the long form also with a draft model and with an Eagle3 head; what is expected comes
from transformers, so no second server is needed. Routers over mock workers. The long form has the benchmark's own comparison with SmolLM2,
too, aggregated and disaggregated.
"""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.speculation_head import make_eagle3_head

from calls import Call, collect, connect, ids_of, prefill
from prompts import make_prompts
from routers import mocks, router
from servers import Server, free_ports, get_text, serve, tandem, wait_for
from tandem_protocol import handoff

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
TOKENS = 48
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
TIE = 1e-3
"""Logits closer than this may come in another order when they are added up in another one."""
ACCEPTED, DRAFTS = "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_drafts_total"
GUESSED = "vllm:spec_decode_num_draft_tokens_total"
EXPECTED = {"draft_model": (True, True), "ngram": (False, True), "eagle3": (False, False)}
"""Whether all guesses are accepted, and whether any is."""
PREFILLED = "vllm:prompt_tokens_total"
BYTES, UNPAIRED = "vllm:nixl_bytes_transferred_sum", "tandem_worker_unpaired_handoffs_total"
MIRROR_S = 30.0
PROMPT = [(i * 31) % 30000 + 1 for i in range(16 * 20)]


@pytest.fixture(scope="module", params=["ngram", pytest.param("draft_model", marks=pytest.mark.slow),
                                        pytest.param("eagle3", marks=pytest.mark.slow)])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """How it speculates: the model's own checkpoint as draft guesses right, a head with random weights doesn't."""
    if request.param == "ngram":
        return NGRAM
    if request.param == "draft_model":
        return {"method": "draft_model", "model": str(tiny_model), "num_speculative_tokens": 4}
    head = make_eagle3_head(tiny_model, tmp_path_factory.mktemp("head") / "head")
    return {"method": "eagle3", "model": str(head), "num_speculative_tokens": 4}


@pytest.fixture(scope="module")
def speculating(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, config: dict[str, Any]) -> Iterator[Server]:
    """Prefill and decode that speculate."""
    limits = ["--max-num-seqs", "8", "--max-model-len", "2048", "--dtype", "float32", "--routers", "0"]
    with serve(tmp_path_factory.mktemp("run"), "--mode", "disagg", "--model", str(tiny_model), *limits,
               "--speculative-config", json.dumps(config)) as running:
        yield running


@pytest.fixture
async def asked(speculating: Server) -> AsyncIterator[Any]:
    """A gRPC client of the speculating server."""
    async with connect(speculating.grpc_url) as connected:
        yield connected


class Judge:
    """The same model in transformers."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch: Any = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def is_greedy(self, prompt: list[int], answer: list[int]) -> bool:
        """Whether every token is the likeliest after those before it, or as likely as that."""
        with self._torch.no_grad():
            logits = self._model(self._torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, self._torch.tensor(answer)[:, None])[:, 0]
        return len(answer) == TOKENS and bool((logits.max(dim=1).values - chosen < TIE).all())


async def test_the_text_is_the_plain_one_and_guesses_are_accepted(speculating: Server, asked: Any, tiny_model: Path,
                                                                  config: dict[str, Any]) -> None:
    """On one engine and over two with NIXL, with the same guesses; all figures of it are on the worker's and on Triton's port.

    After each handoff vLLM counts one guess more, whose tokens it pads and refuses.
    """
    judge, names = Judge(tiny_model), (ACCEPTED, DRAFTS, GUESSED, BYTES)
    prompts = make_prompts(3, 40, 300)
    changes = {}
    for model in ("decode", "disagg"):
        before = [speculating.metric("decode", name) for name in names]
        for prompt in prompts:
            ids = await ids_of(asked, Call(model, prompt=prompt, sampling=GREEDY, returns=("output_ids",)))
            assert judge.is_greedy(prompt, ids), f"{model}: {ids}"
        changes[model] = [speculating.metric("decode", name) - earlier for name, earlier in zip(names, before, strict=True)]
    (accepted, drafts, guessed, _), moved = changes["decode"], changes["disagg"].pop()
    assert changes["disagg"] == [accepted, drafts + len(prompts), guessed + len(prompts) * config["num_speculative_tokens"]]
    assert changes["decode"][-1] == 0 < moved
    assert guessed > 0
    assert (accepted == guessed, accepted > 0) == EXPECTED[config["method"]]
    assert speculating.metric("decode", "tandem_worker_accept_length") == pytest.approx(1 + accepted / drafts, rel=0.01)
    wait_for(lambda: _shown_by_triton(speculating) >= {ACCEPTED, DRAFTS, "tandem_worker_accept_length"}, MIRROR_S, "Triton to show them")


def _shown_by_triton(server: Server) -> set[str]:
    return {line.split("{")[0] for line in get_text(f"http://127.0.0.1:{server.metrics_port}/metrics").splitlines()}


async def test_a_handoff_of_another_speculation_is_not_taken(speculating: Server, asked: Any, tiny_model: Path,
                                                             config: dict[str, Any]) -> None:
    """Decode gives it back, computes the prompt by itself, and counts that; the right one is taken."""
    [prompt] = make_prompts(1, 200, 200)
    call = Call("prefill", prompt=prompt, sampling=GREEDY)
    received = handoff.decode(await prefill(asked, call))
    theirs = handoff.speculation_of(received)
    assert theirs.startswith(f"{config['method']}(")
    assert all(f"{name}={value}" in theirs for name, value in config.items() if name != "method")
    received[handoff.SPECULATION] = theirs.replace("num_speculative_tokens=4", "num_speculative_tokens=9")
    moved, unpaired = (speculating.metric("decode", name) for name in (BYTES, UNPAIRED))
    answer = await collect(asked, Call("decode", prompt=prompt, sampling=GREEDY, returns=("output_ids",), handoff=handoff.encode(received)))
    assert Judge(tiny_model).is_greedy(prompt, [token for response in answer for token in response["output_ids"]])
    assert speculating.metric("decode", BYTES) == moved
    assert speculating.metric("decode", UNPAIRED) == unpaired + 1


def test_a_router_pairs_like_with_like(tmp_path: Path, tiny_model: Path) -> None:
    """Of two prefill workers only the one that speculates as the decode worker does is used."""
    alike = ("--speculation", "a")
    with mocks(tmp_path, "--role", "prefill", "--name", "p"), mocks(tmp_path, "--role", "prefill", "--name", "q", *alike) as fits, \
            mocks(tmp_path, "--role", "decode", "--name", "d", *alike), router(tmp_path, 3, tiny_model) as local:
        before = fits.metric(PREFILLED)
        for turn in range(4):
            assert local.send([*PROMPT, turn + 1], max_tokens=4).text
        assert fits.metric(PREFILLED) == before + 4 * (len(PROMPT) + 1)
        assert local.metric("tandem_router_unpaired_prefills_total") == 0


def test_a_decode_worker_that_nobody_fits_prefills_by_itself(tmp_path: Path, tiny_model: Path) -> None:
    """That is counted, and a query says why."""
    with mocks(tmp_path, "--role", "prefill", "--name", "p", "--speculation", "b") as other, \
            mocks(tmp_path, "--role", "decode", "--name", "d", "--speculation", "a"), router(tmp_path, 2, tiny_model) as local:
        before = other.metric(PREFILLED)
        assert local.send(PROMPT, max_tokens=4).text
        assert "theirs: b" in local.query(PROMPT)["prefill"]["reason"]
        assert local.metric("tandem_router_unpaired_prefills_total") == 1
        assert other.metric(PREFILLED) == before


def test_the_launcher_refuses_a_mistake_at_once(tmp_path: Path) -> None:
    """With one sentence, before anything is started."""
    port = str(free_ports(3))
    mistake = json.dumps({**NGRAM, "method": "draft_model", "model": str(tmp_path / "nowhere")})
    refused = tandem(tmp_path, "serve", "--http-port", port, "--speculative-config", mistake, timeout_s=60)
    assert refused.returncode != 0
    assert f"there is no draft model {tmp_path / 'nowhere'}: give an existing folder" in refused.stderr
    assert not list(tmp_path.glob("*.log"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("case", ["ngram", "draft_model", "disagg", "disagg_ngram", "eagle3", "disagg_eagle3"])
def test_smollm2_says_the_same_with_and_without(tmp_path: Path, case: str) -> None:
    """Texts of four prompts equal or at a tie; nine of ten guesses of its own checkpoint accepted."""
    command = [sys.executable, "-m", "benchmarks.gpu.speculation", "--cases", f"plain,{case}", "--prompts", "4", "--output-tokens", "32",
               "--port", str(free_ports(150)), "--log-dir", str(tmp_path / "logs"), "--start-timeout", "400"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1400, check=False)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["passed"], f"{report}\n{done.stderr[-2000:]}"
    assert [one["case"] for one in report["cases"]] == ["plain", case]
