# SPDX-License-Identifier: Apache-2.0
"""How settings are declared and resolved.

A component declares its settings once, as a frozen dataclass whose fields are made by `setting`. Resolution order, the
same everywhere: a command-line flag, then the environment variable, then the model's config parameter, then the
default. The launcher hands its flags to workers as environment variables, so inside a worker the order is environment,
config parameter, default. Unknown config parameters are an error.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tandem_protocol.errors import ConfigError

T = TypeVar("T")
Parser = Callable[[str], Any]

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


@dataclasses.dataclass(frozen=True)
class SettingSpec:
    """What is known of one setting besides its value."""

    env: str
    parse: Parser
    help: str
    unit: str
    flag: bool


def setting(*, env: str, default: Any, parse: Parser, help: str, unit: str = "", flag: bool = True) -> Any:  # noqa: A002 - argparse's word
    """Declares a dataclass field that is also an environment variable, a config parameter and a `tandem serve` flag.

    `help` is one sentence with the reason for the default; `unit` is empty for plain values; `flag` is false for
    settings that only make sense per model.
    """
    return dataclasses.field(default=default, metadata={"setting": SettingSpec(env, parse, help, unit, flag)})


def specs_of(cls: type[Any]) -> dict[str, SettingSpec]:
    """Field name -> spec, in order of declaration."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(cls)}


def resolve(cls: type[T], parameters: Mapping[str, str], environ: Mapping[str, str]) -> T:
    """Builds `cls` from config parameters and environment; the environment wins.

    Raises ConfigError for a parameter that `cls` doesn't have, or a value that doesn't parse.
    """
    specs = specs_of(cls)
    unknown = sorted(set(parameters) - set(specs))
    if unknown:
        raise ConfigError(f"unknown parameter {unknown[0]!r} in config.pbtxt: known are {', '.join(sorted(specs))}")
    values: dict[str, Any] = {}
    for name, spec in specs.items():
        if environ.get(spec.env):
            values[name] = parse_value(spec, spec.env, environ[spec.env])
        elif name in parameters:
            values[name] = parse_value(spec, f"parameter {name!r}", parameters[name])
    return cls(**values)


def parse_value(spec: SettingSpec, source: str, text: str) -> Any:
    """Parses one value; a ConfigError names where the value stands."""
    try:
        return spec.parse(text)
    except ValueError as exc:
        raise ConfigError(f"{source}={text!r} is not valid: {exc}") from exc


def parse_bool(text: str) -> bool:
    """true/1/yes/on and false/0/no/off, in any case."""
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError("expected true or false")


def parse_int(low: int, high: int) -> Parser:
    """A parser for an integer within [low, high]."""

    def parse(text: str) -> int:
        if not low <= (value := int(text)) <= high:
            raise ValueError(f"expected an integer from {low} to {high}")
        return value

    return parse


def parse_float(low: float, high: float) -> Parser:
    """A parser for a finite number within [low, high]."""

    def parse(text: str) -> float:
        if not low <= (value := float(text)) <= high:
            raise ValueError(f"expected a number from {low} to {high}")
        return value

    return parse


def parse_words(text: str) -> tuple[str, ...]:
    """Words separated by blanks or commas, in order."""
    return tuple(text.replace(",", " ").split())
