# SPDX-License-Identifier: Apache-2.0
"""The front of the `tandem` command: subcommands, exit codes, one sentence per error."""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tandem_cli import main as front
from tandem_cli.main import SUBCOMMANDS, Subcommand, main
from tandem_protocol.errors import ConfigError, EngineError


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """Installs a subcommand `probe` and one with passthrough, `relay`; each records its arguments and returns 7."""
    seen: list[argparse.Namespace] = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model")

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 7

    monkeypatch.setitem(sys.modules, "probe_module", SimpleNamespace(add_arguments=add_arguments, run=run))
    monkeypatch.setitem(SUBCOMMANDS, "probe", Subcommand("probe_module", "tries"))
    monkeypatch.setitem(SUBCOMMANDS, "relay", Subcommand("probe_module", "tries", passthrough=True))
    return seen


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes every subcommand raise."""

    def dispatch(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(front, "_dispatch", dispatch)


def test_exit_code_is_the_subcommands(ran: list[argparse.Namespace]) -> None:
    """What `run` returns is what the shell sees."""
    assert main(["probe", "--model", "m"]) == 7
    assert ran[0].model == "m"


def test_unknown_arguments_pass_through_where_asked_for(ran: list[argparse.Namespace]) -> None:
    """vLLM's own flags reach `serve` in order, and none is taken for the abbreviation of another."""
    assert main(["relay", "--max-model-len", "4096", "--model", "m", "--mod", "x"]) == 7
    assert ran[0].passthrough == ["--max-model-len", "4096", "--mod", "x"]


@pytest.mark.parametrize("argv", [["probe", "--nope"], ["probe", "--mod", "x"], ["nope"], []])
def test_misuse_exits_with_2(argv: list[str], ran: list[argparse.Namespace]) -> None:
    """Unknown subcommands and arguments, and abbreviations, run nothing."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert not ran


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    """The table is the help."""
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown and subcommand.summary in shown for name, subcommand in SUBCOMMANDS.items())


@pytest.mark.parametrize(("error", "code"), [(ConfigError("set X"), 2), (EngineError("broke"), 1)])
def test_error_is_one_sentence(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback for what Tandem raises on purpose; misuse has a code of its own."""
    failing(monkeypatch, error)
    assert main([]) == code
    assert capsys.readouterr().err == f"tandem: {error}\n"


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C exits as shells expect."""
    failing(monkeypatch, KeyboardInterrupt())
    assert main([]) == 130


def test_broken_pipe_is_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """`tandem ... | head` prints no traceback, not even from the interpreter's last flush."""
    failing(monkeypatch, BrokenPipeError())
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert main([]) == 141
    assert capfd.readouterr().err == ""


def test_front_imports_no_heavy_module() -> None:
    """Asking for help must not wait for numpy and gRPC: subcommands are imported when they run."""
    script = "import sys, tandem_cli.main; print(sorted({'grpc', 'numpy', 'aiohttp', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Tandem didn't raise on purpose keeps its traceback."""
    failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main([])
