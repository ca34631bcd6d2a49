# SPDX-License-Identifier: Apache-2.0
"""Logs of every process of ours: one format, levels by `DYN_LOG` and a file, JSON lines by `DYN_LOGGING_JSONL`.

What a line is about is bound once (`bind`), in the context that Triton's request is read in; event-loop callbacks and tasks inherit it.
So every line about a request carries its id, which is the same in router, prefill and decode, and the client's W3C trace id.
"""

import contextvars
import json
import logging
import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tandem_protocol.errors import ConfigError
from tandem_protocol.settings import parse_bool
from tandem_protocol.trace import trace_id_of

LEVEL_VARIABLE = "DYN_LOG"
JSONL_VARIABLE = "DYN_LOGGING_JSONL"
LOCAL_TIME_VARIABLE = "DYN_LOG_USE_LOCAL_TZ"
FILE_VARIABLE = "DYN_LOGGING_CONFIG_PATH"
TRACE = 5
"""Below DEBUG, as in Rust's `tracing`, whose level names `DYN_LOG` has."""
_LEVELS = {"trace": TRACE, "debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "warning": logging.WARNING,
           "error": logging.ERROR, "off": logging.CRITICAL + 1}
_TEXT_FORMAT = "%(asctime)s %(levelname)s [{source}] %(name)s %(message)s"

_subject: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar("tandem_log_subject", default=None)


@dataclass(frozen=True)
class LogSettings:
    """The level of what no filter names (None: the process's own default), levels by logger, the format, and whose time it tells."""

    level: int | None = None
    filters: tuple[tuple[str, int], ...] = ()
    jsonl: bool = False
    local_time: bool = False
    """This host's time zone instead of UTC."""

    def level_of(self, package: str, default: int) -> int:
        """The level of a package that is no filter's submodule."""
        return dict(self.filters).get(package, default if self.level is None else self.level)


def load_settings(environ: Mapping[str, str] | None = None) -> LogSettings:
    """Reads the four variables. Raises ConfigError.

    `DYN_LOG` is a list separated by commas: a level for everything, and `module=level`; `a::b:level` is understood, too. It comes
    before the file, which is TOML as Dynamo's: `log_level`, and a table `log_filters` of levels by module.
    """
    environ = os.environ if environ is None else environ
    level, named = _from_file(environ.get(FILE_VARIABLE, ""))
    for item in filter(None, (part.strip() for part in environ.get(LEVEL_VARIABLE, "").split(","))):
        module, its_level = _split(item)
        if module:
            named[module] = its_level
        else:
            level = its_level
    return LogSettings(level, tuple(named.items()), _switch(environ, JSONL_VARIABLE), _switch(environ, LOCAL_TIME_VARIABLE))


def _switch(environ: Mapping[str, str], variable: str) -> bool:
    try:
        return parse_bool(environ.get(variable) or "false")
    except ValueError as exc:
        raise ConfigError(f"{variable}={environ[variable]!r} is not valid: {exc}") from exc


def _from_file(path: str) -> tuple[int | None, dict[str, int]]:
    if not path:
        return None, {}
    try:
        given = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{FILE_VARIABLE}={path}: {exc}; it must name a TOML file like log_level = \"info\"") from exc
    filters, level = given.get("log_filters", {}), given.get("log_level")
    if not isinstance(filters, dict):
        raise ConfigError(f"{FILE_VARIABLE}={path}: log_filters must be a table of levels by module")
    named = {str(module).replace("::", "."): _level(its, path) for module, its in filters.items()}
    return None if level is None else _level(level, path), named


def _level(name: object, path: str) -> int:
    level = _LEVELS.get(str(name).strip().lower())
    if level is None:
        raise ConfigError(f"{FILE_VARIABLE}={path}: {name!r} is no level: {', '.join(_LEVELS)}")
    return level


def _split(item: str) -> tuple[str, int]:
    module, equals, name = item.rpartition("=")
    if not equals:
        module, _, name = item.rpartition(":")
    level = _LEVELS.get(name.strip().lower())
    if level is None:
        known = ", ".join(_LEVELS)
        raise ConfigError(f"{LEVEL_VARIABLE}: {item!r} is neither a level ({known}) nor module=level, e.g. info,tandem_router=debug")
    return module.strip().replace("::", "."), level


def configure(source: str, *packages: str, default: int = logging.INFO, settings: LogSettings | None = None) -> None:
    """Sends these packages' logs to stderr, which is tritonserver's log; `source` names the process. Raises ConfigError."""
    settings = load_settings() if settings is None else settings
    logging.addLevelName(TRACE, "TRACE")
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter if settings.jsonl else TextFormatter
    handler.setFormatter(formatter(source, local_time=settings.local_time))
    for package in (*packages, "tandem_protocol"):
        logger = logging.getLogger(package)
        logger.handlers[:] = [handler]
        logger.setLevel(settings.level_of(package, default))
        logger.propagate = False
    for module, level in settings.filters:
        logging.getLogger(module).setLevel(level)


def bind(request_id: str, trace: Mapping[str, str]) -> None:
    """What is logged in this context, and in what it starts, is about this request."""
    trace_id = trace_id_of(trace)
    _subject.set({"request_id": request_id, **({"trace_id": trace_id} if trace_id else {})})


class TextFormatter(logging.Formatter):
    """A line for people: time, level, process, module, message, then what it is about."""

    def __init__(self, source: str, *, local_time: bool = False) -> None:
        super().__init__(_TEXT_FORMAT.format(source=source.replace("%", "%%")))
        self._local_time = local_time

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """As in JSON: vLLM's and tritonserver's lines beside ours have other forms, and no zone."""
        return _time(record, self._local_time)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without an exception's traceback."""
        said = record.getMessage()
        about = (f"{name}={value}" for name, value in (_subject.get() or {}).items() if f"{name}=" not in said)
        return " ".join((super().formatMessage(record), *about))


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the field names of Dynamo's; a traceback stands in `exception`."""

    def __init__(self, source: str, *, local_time: bool = False) -> None:
        super().__init__()
        self._source = source
        self._local_time = local_time

    def format(self, record: logging.LogRecord) -> str:
        """The object."""
        level = "WARN" if record.levelno == logging.WARNING else record.levelname
        line = {"time": _time(record, self._local_time), "level": level, "target": record.name, "message": record.getMessage(),
                "source": self._source, "process": record.process, **(_subject.get() or {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _time(record: logging.LogRecord, local: bool) -> str:
    """With its offset from UTC, `Z` for none, so that nobody has to know where a line was written."""
    told = datetime.fromtimestamp(record.created, UTC)
    return (told.astimezone() if local else told).isoformat(timespec="microseconds").replace("+00:00", "Z")


def engine_variables(settings: LogSettings, path: Path) -> dict[str, str]:
    """What makes vLLM, in all its processes, log as we do: for JSON its logging configuration, written to `path`."""
    if settings.jsonl:
        path.write_text(json.dumps(_engine_config(settings)))
        return {"VLLM_LOGGING_CONFIG_PATH": str(path)}
    level = dict(settings.filters).get("vllm")
    return {} if level is None else {"VLLM_LOGGING_LEVEL": logging.getLevelName(max(level, logging.DEBUG))}


def _engine_config(settings: LogSettings) -> dict[str, Any]:
    level = dict(settings.filters).get("vllm", logging.INFO)
    return {
        "version": 1, "disable_existing_loggers": False,
        "formatters": {"json": {"()": "tandem_protocol.logs.JsonFormatter", "source": "vllm", "local_time": settings.local_time}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "loggers": {"vllm": {"handlers": ["stderr"], "level": level, "propagate": False}},
    }
