# SPDX-License-Identifier: Apache-2.0
"""Engine arguments on the command line."""

from typing import Any

import pytest

from tandem_cli.serve import engine_arguments
from tandem_cli.serve.engine_arguments import known_engine_arguments, parse_engine_arguments
from tandem_protocol.errors import ConfigError

KNOWN = frozenset({"max_model_len", "enforce_eager", "enable_prefix_caching", "dtype", "hf_overrides", "served_model_name", "seed"})


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM with few arguments."""
    monkeypatch.setattr(engine_arguments, "known_engine_arguments", lambda: KNOWN)


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], {}),
        (["--max-model-len", "2048"], {"max_model_len": 2048}),
        (["--max-model-len=2048"], {"max_model_len": 2048}),
        (["--max_model_len", "2048"], {"max_model_len": 2048}),
        (["--enforce-eager"], {"enforce_eager": True}),
        (["--enforce-eager", "--seed", "1"], {"enforce_eager": True, "seed": 1}),
        (["--enforce-eager", "false"], {"enforce_eager": False}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
        (["--dtype="], {"dtype": ""}),
        (["--hf-overrides", '{"a": [1, null]}'], {"hf_overrides": {"a": [1, None]}}),
        (["--served-model-name=a=b"], {"served_model_name": "a=b"}),
        (["--seed", "-1"], {"seed": -1}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
    ],
)
def test_forms(tokens: list[str], expected: dict[str, Any]) -> None:
    """Values are JSON where they are JSON, else the text itself; the last one wins."""
    assert parse_engine_arguments(tokens) == expected


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["--max-model-length", "1"], "unknown argument --max-model-length: did you mean --max-model-len"),
     (["--xyzzy"], "unknown argument --xyzzy: see vLLM's engine arguments"), (["2048"], "unexpected argument '2048'"),
     (["--seed", "1", "2"], "unexpected argument '2'"), (["-x"], "unexpected argument '-x'")],
)
def test_what_vllm_does_not_know_is_refused(tokens: list[str], message: str) -> None:
    """With the nearest that it knows."""
    with pytest.raises(ConfigError, match=message):
        parse_engine_arguments(tokens)


def test_without_vllm_every_name_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker checks again."""
    monkeypatch.setattr(engine_arguments, "known_engine_arguments", frozenset)
    assert parse_engine_arguments(["--xyzzy", "1"]) == {"xyzzy": 1}


def test_known_arguments_are_read_off_vllms_source() -> None:
    """Without importing it, which takes seconds."""
    pytest.importorskip("vllm")
    assert {"model", "max_model_len", "enable_log_requests", "kv_transfer_config", "tensor_parallel_size"} <= known_engine_arguments()
