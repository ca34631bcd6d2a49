# SPDX-License-Identifier: Apache-2.0
"""Engine arguments on the command line of `tandem serve`: `--max-model-len 2048` becomes `max_model_len: 2048` in model.json."""

import ast
import difflib
import functools
import importlib.util
import json
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

from tandem_protocol.errors import ConfigError
from tandem_worker.ranks import HEADLESS
from tandem_worker.speculation import check_speculation

_ARGUMENT_CLASSES = frozenset({"EngineArgs", "AsyncEngineArgs"})


def parse_engine_arguments(tokens: Sequence[str]) -> dict[str, Any]:
    """Parses what `tandem serve` itself doesn't know. Raises ConfigError for what vLLM doesn't know either."""
    arguments = read_arguments(tokens)
    if known := known_engine_arguments():
        check_known(arguments, known | {HEADLESS})  # which is an option of `vllm serve` only
    check_speculation(arguments, known_speculative_methods())
    return arguments


def read_arguments(tokens: Sequence[str]) -> dict[str, Any]:
    """Names and values as they stand there. Raises ConfigError for what is not written --name value."""
    arguments: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        name, value, rest = _take(rest)
        arguments[name] = value
    return arguments


def check_known(names: Iterable[str], known: Set[str]) -> None:
    """Raises ConfigError for the first that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{close[0].replace('_', '-')}?" if close else "see vLLM's engine arguments"
            raise ConfigError(f"unknown argument --{name.replace('_', '-')}: {hint}")


def _take(tokens: list[str]) -> tuple[str, Any, list[str]]:
    """The first argument with its value: `--name value`, `--name=value`, or a bare `--name` and `--no-name`."""
    head, rest = tokens[0], tokens[1:]
    if not head.startswith("--"):
        raise ConfigError(f"unexpected argument {head!r}: engine arguments are written --name value")
    name, equals, value = head[2:].partition("=")
    name = name.replace("-", "_")
    if equals:
        return name, _value(value), rest
    if rest and not rest[0].startswith("--"):
        return name, _value(rest[0]), rest[1:]
    if name.startswith("no_"):
        return name[3:], False, rest
    return name, True, rest


def _value(text: str) -> Any:
    """JSON where it is JSON (numbers, booleans, nested configuration), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@functools.cache
def known_engine_arguments() -> frozenset[str]:
    """The fields of vLLM's AsyncEngineArgs, read off its source: importing vLLM takes seconds. Empty without vLLM."""
    tree = _source("engine", "arg_utils.py")
    return frozenset() if tree is None else fields_of(tree, _ARGUMENT_CLASSES)


def fields_of(tree: ast.Module, names: Set[str]) -> frozenset[str]:
    """The annotated fields of a module's classes of these names."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    return frozenset(
        item.target.id for cls in classes for item in cls.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


@functools.cache
def known_speculative_methods() -> frozenset[str]:
    """vLLM's `SpeculativeMethod`, a Literal of texts and of other Literals, read off its source. Empty without vLLM."""
    tree = _source("config", "speculative.py")
    assigned = {node.targets[0].id: node.value for node in (tree.body if tree else []) if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)}

    def texts(node: ast.AST | None) -> frozenset[str]:
        inner = ast.walk(node) if node is not None else ()
        return frozenset().union(*({str(part.value)} if isinstance(part, ast.Constant) else texts(assigned.get(part.id))
                                   for part in inner if isinstance(part, ast.Constant | ast.Name)))

    return texts(assigned.get("SpeculativeMethod"))


def _source(*path: str) -> ast.Module | None:
    """One of vLLM's modules; None without vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return ast.parse(Path(spec.origin).parent.joinpath(*path).read_text())
