# SPDX-License-Identifier: Apache-2.0
"""Options of `tandem serve`."""

import argparse

import pytest

from tandem_cli.serve.fleet import Counts, Mode
from tandem_cli.serve.options import ServeOptions, add_arguments, parse_options
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_protocol.settings import specs_of
from tandem_worker.config import WorkerSettings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite must not depend on the caller's variables."""
    for spec in specs_of(WorkerSettings).values():
        monkeypatch.delenv(spec.env, raising=False)


def parse(*line: str) -> ServeOptions:
    """The options of a command line, split as in `main`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args, rest = parser.parse_known_args(line)
    args.passthrough = rest
    return parse_options(args)


def test_defaults() -> None:
    """Everything in one server, on Triton's own ports."""
    options = parse()
    assert (options.model, options.mode, options.only, options.counts) == (None, Mode.BOTH, None, Counts())
    assert (options.http_port, options.grpc_port, options.metrics_port) == (8000, 8001, 8002)
    assert (options.environment, options.engine_arguments, options.detach) == ({}, {}, False)


@pytest.mark.parametrize(
    ("line", "environment"),
    [
        (["--connector", "nixl", "lmcache"], {"DYN_CONNECTOR": "nixl lmcache"}),
        (["--prefill-connector", "kvbm", "nixl"], {"TANDEM_PREFILL_CONNECTOR": "kvbm nixl"}),
        (["--connector", "kvbm", "--cpu-cache-gb", "20", "--disk-cache-dir", "/mnt"],
         {"DYN_CONNECTOR": "kvbm", "DYN_KVBM_CPU_CACHE_GB": "20", "DYN_KVBM_DISK_CACHE_DIR": "/mnt"}),
        (["--no-use-vllm-tokenizer"], {"DYN_VLLM_USE_TOKENIZER": "false"}),
        (["--use-vllm-tokenizer"], {"DYN_VLLM_USE_TOKENIZER": "true"}),
        (["--admin-port", "9000"], {"DYN_SYSTEM_PORT": "9000"}),
        (["--admin-port=-1"], {"DYN_SYSTEM_PORT": "-1"}),
        (["--drain-timeout-s", "5"], {"TANDEM_DRAIN_TIMEOUT_S": "5"}),
    ],
)
def test_worker_settings_become_variables(line: list[str], environment: dict[str, str]) -> None:
    """They reach the workers that way, and win over the caller's."""
    assert parse(*line).environment == environment


def test_every_setting_with_a_flag_has_one() -> None:
    """And the others have none."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    for name, spec in specs_of(WorkerSettings).items():
        if name not in {"model"}:  # `--model` is the launcher's own
            assert (f"--{name.replace('_', '-')}" in flags) is spec.flag


def test_a_bad_setting_names_its_flag() -> None:
    """Before anything is started."""
    with pytest.raises(ConfigError, match="--kv-event-port='99999' is not valid"):
        parse("--kv-event-port", "99999")


@pytest.mark.parametrize(("flag", "role"), [("--is-prefill-worker", Role.PREFILL), ("--is-decode-worker", Role.DECODE)])
def test_a_role_flag_serves_that_role_alone(flag: str, role: Role) -> None:
    """Prefill and decode on different hosts."""
    assert parse(flag).only is role


@pytest.mark.parametrize("value", ["true", "1"])
def test_the_role_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """As in Dynamo."""
    monkeypatch.setenv("DYN_VLLM_IS_DECODE_WORKER", value)
    assert parse().only is Role.DECODE


def test_a_negated_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag wins over a variable, also to say no."""
    monkeypatch.setenv("DYN_VLLM_IS_DECODE_WORKER", "true")
    assert parse("--no-is-decode-worker").only is None


def test_one_role_alone_contradicts_a_mode() -> None:
    """The mode says which roles there are."""
    with pytest.raises(ConfigError, match="--is-prefill-worker serves one role alone, so it can't be combined with --mode agg"):
        parse("--is-prefill-worker", "--mode", "agg")


def test_both_roles_alone_contradict_each_other() -> None:
    """That would be `--mode disagg`."""
    with pytest.raises(ConfigError, match="exclude each other"):
        parse("--is-prefill-worker", "--is-decode-worker")


@pytest.mark.parametrize(("line", "model"), [([], "/from/env"), (["--model", "/from/flag"], "/from/flag")])
def test_the_model_comes_from_flag_or_environment(monkeypatch: pytest.MonkeyPatch, line: list[str], model: str) -> None:
    """The flag wins."""
    monkeypatch.setenv("TANDEM_MODEL", "/from/env")
    assert parse(*line).model == model


def test_everything_else_is_an_engine_argument() -> None:
    """In any place of the line."""
    options = parse("--max-model-len", "2048", "--mode", "agg", "--enforce-eager")
    assert options.engine_arguments == {"max_model_len": 2048, "enforce_eager": True}
    assert options.mode is Mode.AGG
