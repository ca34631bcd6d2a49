# SPDX-License-Identifier: Apache-2.0
"""What a line of our logs says, which are let through, and whom they are about."""

import asyncio
import contextvars
import json
import logging
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tandem_protocol import logs
from tandem_protocol.errors import ConfigError
from tandem_protocol.logs import LogSettings

PACKAGE = "tandem_test_logs"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What came on standard error since the last call; what `configure` does to loggers is undone."""
    protocol = logging.getLogger("tandem_protocol")
    before = protocol.handlers[:], protocol.level, protocol.propagate
    yield lambda: capsys.readouterr().err
    protocol.handlers[:], protocol.propagate = before[0], before[2]
    protocol.setLevel(before[1])


def configured(variables: dict[str, str], default: int = logging.INFO) -> logging.Logger:
    """The logger of a configured package."""
    logs.configure("decode", PACKAGE, default=default, settings=logs.load_settings(variables))
    return logging.getLogger(PACKAGE)


@pytest.mark.parametrize(
    ("text", "level", "filters"),
    [("", None, ()), ("debug", logging.DEBUG, ()), ("WARN", logging.WARNING, ()), ("off", logging.CRITICAL + 1, ()),
     ("info,tandem_router=debug", logging.INFO, (("tandem_router", logging.DEBUG),)),
     ("tandem_router::feed:trace, error", logging.ERROR, (("tandem_router.feed", logs.TRACE),)),
     ("a.b=warning,c=off", None, (("a.b", logging.WARNING), ("c", logging.CRITICAL + 1)))],
)
def test_levels(text: str, level: int | None, filters: tuple[tuple[str, int], ...]) -> None:
    """A level for everything and levels by module, in our way of writing or in Dynamo's."""
    assert logs.load_settings({"DYN_LOG": text}) == LogSettings(level, filters)


@pytest.mark.parametrize("variables", [{"DYN_LOG": "loud"}, {"DYN_LOG": "a=b"}, {"DYN_LOG": "a.b"}, {"DYN_LOGGING_JSONL": "perhaps"},
                                       {"DYN_LOG_USE_LOCAL_TZ": "Europe/Paris"}, {"DYN_LOGGING_CONFIG_PATH": "/nowhere/logging.toml"}])
def test_what_is_no_level_is_refused(variables: dict[str, str]) -> None:
    """With the variable's name."""
    with pytest.raises(ConfigError, match=next(iter(variables))):
        logs.load_settings(variables)


def test_a_file_gives_levels_and_the_variable_comes_before_it(tmp_path: Path) -> None:
    """As Dynamo writes such files."""
    path = tmp_path / "logging.toml"
    path.write_text('log_level = "warn"\n[log_filters]\n"tandem_router::feed" = "trace"\nvllm = "error"\n')
    variables = {"DYN_LOGGING_CONFIG_PATH": str(path)}
    assert logs.load_settings(variables) == LogSettings(logging.WARNING, (("tandem_router.feed", logs.TRACE), ("vllm", logging.ERROR)))
    both = logs.load_settings({**variables, "DYN_LOG": "debug,vllm=info"})
    assert both == LogSettings(logging.DEBUG, (("tandem_router.feed", logs.TRACE), ("vllm", logging.INFO)))


@pytest.mark.parametrize("text", ["log_level = 'loud'", "log_filters = 'debug'", "log_level ="])
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str) -> None:
    """With its name."""
    path = tmp_path / "logging.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"logging\.toml"):
        logs.load_settings({"DYN_LOGGING_CONFIG_PATH": str(path)})


@pytest.mark.parametrize("jsonl", ["0", "1"])
def test_times_are_utc_unless_local_ones_are_wanted(said: Callable[[], str], monkeypatch: pytest.MonkeyPatch, jsonl: str) -> None:
    """Each line tells its offset."""
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        configured({"DYN_LOGGING_JSONL": jsonl}).info("there")
        configured({"DYN_LOGGING_JSONL": jsonl, "DYN_LOG_USE_LOCAL_TZ": "1"}).info("here")
    finally:
        monkeypatch.undo()
        time.tzset()
    there, here = said().splitlines()
    first = [json.loads(line)["time"] if jsonl == "1" else line.split()[0] for line in (there, here)]
    assert first[0].endswith("Z")
    assert first[1].endswith("+05:30")
    apart = datetime.fromisoformat(first[1]) - datetime.fromisoformat(first[0])
    assert abs(apart.total_seconds()) < 60


def test_a_line_for_people(said: Callable[[], str]) -> None:
    """Time, level, process, module, message."""
    configured({}).info("worker.ready seconds=%d", 3)
    assert said().endswith(f" INFO [decode] {PACKAGE} worker.ready seconds=3\n")


def test_filters_let_through_and_hold_back(said: Callable[[], str]) -> None:
    """The most specific one decides."""
    logger = configured({"DYN_LOG": f"error,{PACKAGE}.loud=debug"})
    logger.warning("held")
    logger.getChild("loud").debug("passed")
    lines = said()
    assert "passed" in lines
    assert "held" not in lines
    logging.getLogger(f"{PACKAGE}.loud").setLevel(logging.NOTSET)


def test_a_process_has_its_own_default(said: Callable[[], str]) -> None:
    """The command line says nothing that it need not say, unless asked to."""
    configured({}, default=logging.WARNING).info("quiet")
    assert said() == ""
    configured({"DYN_LOG": "info"}, default=logging.WARNING).info("said")
    assert "said" in said()


async def test_every_line_of_a_request_names_it_and_no_other_line_does(said: Callable[[], str]) -> None:
    """Tasks and callbacks that are started for it inherit what it is about."""
    logger = configured({})
    loop = asyncio.get_running_loop()

    async def serve() -> None:
        logger.info("served")

    def read(request_id: str, trace: dict[str, str]) -> "asyncio.Task[None]":
        logs.bind(request_id, trace)
        loop.call_soon(logger.info, "called")
        return loop.create_task(serve())

    first = contextvars.copy_context().run(read, "r1", {"traceparent": PARENT})
    second = contextvars.copy_context().run(read, "r2", {})
    await asyncio.gather(first, second)
    logger.info("alone")
    lines = said().splitlines()
    trace = "trace_id=4bf92f3577b34da6a3ce929d0e0e4736"
    ends = [line.split(f"{PACKAGE} ")[1] for line in lines]
    assert sorted(ends) == sorted([f"called request_id=r1 {trace}", f"served request_id=r1 {trace}", "called request_id=r2",
                                   "served request_id=r2", "alone"])


def test_a_json_line(said: Callable[[], str]) -> None:
    """One object per line, whatever the message holds, with the traceback inside."""
    logger = configured({"DYN_LOGGING_JSONL": "1"})

    def failing() -> None:
        logs.bind("r1", {"traceparent": PARENT})
        try:
            int("two\nlines")
        except ValueError:
            logger.exception("request.failed: %s", 'with "quotes"\nand a break')

    contextvars.copy_context().run(failing)
    (line,) = said().splitlines()
    fields = json.loads(line)
    assert (fields["level"], fields["target"], fields["source"]) == ("ERROR", PACKAGE, "decode")
    assert fields["message"] == 'request.failed: with "quotes"\nand a break'
    assert (fields["request_id"], fields["trace_id"]) == ("r1", "4bf92f3577b34da6a3ce929d0e0e4736")
    assert "ValueError: invalid literal" in fields["exception"]
    assert fields["time"].endswith("Z")


def test_the_engine_logs_as_we_do(tmp_path: Path) -> None:
    """JSON by vLLM's own configuration file; else its own level, if one is named."""
    path = tmp_path / "logging.json"
    assert logs.engine_variables(LogSettings(), path) == {}
    assert logs.engine_variables(LogSettings(filters=(("vllm", logging.DEBUG),)), path) == {"VLLM_LOGGING_LEVEL": "DEBUG"}
    assert not path.exists()
    assert logs.engine_variables(LogSettings(jsonl=True), path) == {"VLLM_LOGGING_CONFIG_PATH": str(path)}
    written = json.loads(path.read_text())
    assert written["loggers"]["vllm"]["level"] == logging.INFO
    assert written["disable_existing_loggers"] is False
