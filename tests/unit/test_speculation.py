# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding without engines: what is refused with which sentence, who is paired with whom, and what is counted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from discovery_contract import worker
from tandem_cli.serve.engine_arguments import known_speculative_methods, parse_engine_arguments
from tandem_protocol import handoff
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.workers import decode_record, encode_record
from tandem_router.conditional import prefill_route
from tandem_router.config import RouterSettings
from tandem_router.pairing import unpaired, why_alone
from tandem_worker.load import EngineLoad
from tandem_worker.pairing import is_paired
from tandem_worker.responses import encode_handoff
from tandem_worker.speculation import MAX_TOKENS, Acceptance, check_speculation, speculation_of

METHODS = frozenset({"ngram", "ngram_gpu", "draft_model", "eagle", "eagle3", "mtp", "suffix"})
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
EAGLE = {"method": "eagle3", "model": "org/eagle3-head", "num_speculative_tokens": 2, "draft_tensor_parallel_size": 1}


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """The folder of a draft model."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("config", [
    NGRAM, EAGLE, {"method": "mtp", "num_speculative_tokens": 1}, {"method": "suffix"}, {"model": "org/speculator"}, {"model": "ngram",
    "num_speculative_tokens": 3}, {"method": "ngram", "num-speculative-tokens": MAX_TOKENS}, None,
])
def test_what_can_work_is_taken(config: dict[str, Any] | None) -> None:
    """Methods with and without a draft; what only a checkpoint knows is left to vLLM."""
    check_speculation({"speculative_config": config}, METHODS)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"method": "ngrm"}, "unknown speculative method 'ngrm': did you mean 'ngram'?"),
    ({"method": "telepathy"}, "unknown speculative method 'telepathy': choose from draft_model, eagle, eagle3, mtp, ngram"),
    ({"method": None}, "names neither method nor model: add \"method\""),
    ({"num_speculative_tokens": None}, "lacks num_speculative_tokens"),
    ({"num_speculative_tokens": 0}, "num_speculative_tokens 0 .* use a whole number from 1 to 128"),
    ({"num_speculative_tokens": MAX_TOKENS + 1}, "num_speculative_tokens 129 .* from 1 to 128"),
    ({"num_speculative_tokens": True}, "num_speculative_tokens True"),
    ({"num_speculative_tokens": "4"}, "num_speculative_tokens '4'"),
    ({"prompt_lookup_min": 0}, "prompt_lookup_min 0 .* of at least 1"),
    ({"prompt_lookup_min": 5}, "prompt_lookup_min 5 is more than prompt_lookup_max 4"),
    ({"draft_tensor_parallel_size": 3}, "draft_tensor_parallel_size 3 does not work: use 1 or .* 2"),
    ({"method": "draft_model"}, "'draft_model' needs a draft: add \"model\""),
    ({"method": "eagle3", "model": "/nowhere"}, "there is no draft model /nowhere"),
    ({"method": "eagle3", "model": "./nowhere"}, "there is no draft model ./nowhere"),
    ({"method": "eagle3", "model": 7}, "model 7 of speculative_config is no name"),
])
def test_each_mistake_has_its_sentence(change: dict[str, Any], sentence: str) -> None:
    """One field of a good configuration is wrong."""
    with pytest.raises(ConfigError, match=sentence):
        check_speculation({"speculative_config": {**NGRAM, **change}, "tensor_parallel_size": 2}, METHODS)


def test_a_draft_must_be_a_model(draft: Path) -> None:
    """A folder with a config.json is; an empty one is not."""
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    check_speculation({"speculative_config": config}, METHODS)
    (draft / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_speculation({"speculative_config": config}, METHODS)


def test_vllms_shorthands_are_checked_too() -> None:
    """`--spec-method` and its like; what is said twice is refused as vLLM refuses it."""
    check_speculation({"spec_method": "ngram", "spec_tokens": 2}, METHODS)
    with pytest.raises(ConfigError, match="lacks num_speculative_tokens"):
        check_speculation({"spec_method": "ngram"}, METHODS)
    with pytest.raises(ConfigError, match="spec_tokens and num_speculative_tokens of speculative_config say the same"):
        check_speculation({"speculative_config": NGRAM, "spec_tokens": 2}, METHODS)


@pytest.mark.parametrize(("given", "sentence"), [
    ("{method: ngram}", "must be a JSON object"), ("[4]", "must be a JSON object"),
    (json.dumps({**NGRAM, "method": "ngrams"}), "did you mean 'ngram'"),
])
def test_the_launcher_refuses_before_it_starts_anything(given: str, sentence: str) -> None:
    """On the command line, for every role alike."""
    with pytest.raises(ConfigError, match=sentence):
        parse_engine_arguments(["--speculative-config", given])


def test_the_launcher_knows_vllms_methods() -> None:
    """As vLLM itself lists them, read off its source."""
    speculative = pytest.importorskip("vllm.config.speculative")
    known = known_speculative_methods()
    assert {"ngram", "draft_model", "eagle3", "mtp", "suffix", "deepseek_mtp"} <= known
    assert known == set(_flat(speculative.SpeculativeMethod))
    assert parse_engine_arguments(["--speculative-config", json.dumps(NGRAM)]) == {"speculative_config": NGRAM}


def _flat(literal: Any) -> list[str]:
    return list(literal.__args__)


def test_what_prefill_and_decode_share_is_in_the_record() -> None:
    """Of the engine's resolved configuration; records without it are those of engines that don't speculate."""
    config = SimpleNamespace(method="ngram", model="ngram", revision=None, num_speculative_tokens=4, parallel_drafting=False,
                             kv_cache_dtype=None, prompt_lookup_min=2, prompt_lookup_max=4)
    ngram = speculation_of(config)
    assert ngram == "ngram(num_speculative_tokens=4, prompt_lookup_min=2, prompt_lookup_max=4)"
    config.num_speculative_tokens = 5
    assert speculation_of(config) != ngram
    assert speculation_of(None) == ""
    record = worker(speculation=ngram)
    assert decode_record(encode_record(record)) == record
    older = json.loads(encode_record(record))
    del older["speculation"]
    assert decode_record(json.dumps(older).encode()).speculation == ""


@pytest.mark.parametrize("change", [
    {"method": "eagle"}, {"model": "org/another-head"}, {"revision": "v2"}, {"num_speculative_tokens": 3}, {"parallel_drafting": True},
    {"kv_cache_dtype": "fp8"},
])
def test_heads_that_differ_are_not_paired(change: dict[str, Any]) -> None:
    """A head's KV blocks are of use only to the same head; a handoff of another one is given back, and routers don't ask for it."""
    head = {"method": "eagle3", "model": "org/head", "revision": "v1", "num_speculative_tokens": 2, "parallel_drafting": False,
            "kv_cache_dtype": None}
    own, other = (speculation_of(SimpleNamespace(**config)) for config in (head, {**head, **change}))
    assert is_paired({handoff.SPECULATION: own}, own)
    assert not is_paired({handoff.SPECULATION: other}, own)
    assert unpaired([worker("p", speculation=other), worker("q", speculation=own)], worker("d", speculation=own)) == {"p"}


def test_only_workers_that_speculate_alike_are_paired() -> None:
    """The sentence names both."""
    same, other, none = (worker(name, speculation=how) for name, how in (("p1", "ngram(k=4)"), ("p2", "ngram(k=2)"), ("p3", "")))
    decode = worker("d", speculation="ngram(k=4)")
    assert unpaired([same, other, none], decode) == {"p2", "p3"}
    assert why_alone([same, other], decode) == ""
    assert why_alone([], decode) == ""
    assert why_alone([other, none], decode) == (
        "no prefill worker speculates as decode worker d does (ngram(k=4); theirs: ngram(k=2) and none): "
        "start both roles with the same --speculative-config")


def test_a_decode_worker_alone_prefills_by_itself() -> None:
    """Unless disaggregation is enforced."""
    settings = RouterSettings(router_conditional_disagg=False)
    route = prefill_route(500, 500, settings, prefill_available=True, alone="no prefill worker speculates so")
    assert not route.remote
    assert "no prefill worker speculates so" in route.reason
    with pytest.raises(UnavailableError, match="disaggregation is enforced, and no prefill worker speculates so"):
        prefill_route(500, 500, RouterSettings(enforce_disagg=True), prefill_available=True, alone="no prefill worker speculates so")


def test_a_handoff_says_how_its_prefill_worker_speculates() -> None:
    """A decode worker that does otherwise doesn't take it, and counts that; without speculation a handoff is the connector's alone."""
    output: Any = SimpleNamespace(kv_transfer_params={"do_remote_prefill": True, "remote_port": 7})
    plain, ngram = (handoff.decode(encode_handoff(output, how)["kv_transfer_params"][0]) for how in ("", "ngram(k=4)"))
    assert plain == output.kv_transfer_params
    before = _unpaired()
    assert is_paired(plain, "")
    assert is_paired(ngram, "ngram(k=4)")
    assert _unpaired() == before
    assert not is_paired(ngram, "")
    assert not is_paired(plain, "ngram(k=4)")
    assert _unpaired() == before + 2


def _unpaired() -> float:
    return REGISTRY.get_sample_value("tandem_worker_unpaired_handoffs_total") or 0.0


def test_the_accept_length_follows_the_engine() -> None:
    """One plus accepted tokens per guess; later guesses weigh more; none before the first."""
    acceptance = Acceptance()
    assert acceptance.length is None
    acceptance.record(10, 20)
    assert acceptance.length == 3.0
    for _ in range(100):
        acceptance.record(200, 0)
    assert 1.0 < acceptance.length < 1.01


def test_steps_with_guesses_are_recorded() -> None:
    """As vLLM's scheduler tells of them; steps without any say nothing."""
    load = EngineLoad()
    figures = {"num_running_reqs": 1, "num_waiting_reqs": 0, "kv_cache_usage": 0.1}
    load.record(SimpleNamespace(**figures, spec_decoding_stats=None), 1)
    assert load.acceptance.length is None
    load.record(SimpleNamespace(**figures, spec_decoding_stats=_guesses(4, 2)), 8)
    assert load.acceptance.length == 4.0


@pytest.mark.parametrize(("accepted", "begun", "computed", "length"), [
    ((0, 4, 4), 1, 0, 5.0), ((0, 4, 4), 1, 1, 5.0), ((0, 0, 4), 1, 0, 3.0), ((4, 4), 1, 0, 5.0), ((0,), 1, 0, None),
    ((0, 4), 1, 300, 3.0), ((0, 0, 4), 2, 300, 1 + 4 / 3), ((0, 4), 0, 0, 3.0),
])
def test_what_vllm_pads_is_no_guess(accepted: tuple[int, ...], begun: int, computed: int, length: float | None) -> None:
    """The first step of a handed-over prompt is counted as a refused guess; a prompt that was computed here has no such step."""
    load = EngineLoad()
    figures = {"num_running_reqs": 1, "num_waiting_reqs": 0, "kv_cache_usage": 0.1}
    load.record(SimpleNamespace(**figures, spec_decoding_stats=_guesses(*accepted)), 8, begun, computed)
    assert load.acceptance.length == length


def _guesses(*accepted: int) -> SimpleNamespace:
    """One step's guesses of four tokens, as vLLM's scheduler sums them up."""
    by_position = [sum(one > position for one in accepted) for position in range(4)]
    return SimpleNamespace(num_drafts=len(accepted), num_accepted_tokens=sum(accepted), num_accepted_tokens_per_pos=by_position)
