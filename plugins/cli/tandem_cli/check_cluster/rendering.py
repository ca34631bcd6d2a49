# SPDX-License-Identifier: Apache-2.0
"""Renders the chart with the chosen values, as the install would."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tandem_protocol.errors import ConfigError

_TIMEOUT_S = 30
_LOADER, _DUMPER = getattr(yaml, "CSafeLoader", yaml.SafeLoader), getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's where it was built in, which takes a tenth of the time."""


@dataclass(frozen=True)
class Chosen:
    """What will be installed, and how."""

    chart: Path
    namespace: str
    release: str
    values: tuple[str, ...] = ()
    """Values files."""
    sets: tuple[str, ...] = ()
    """KEY=VALUE, as for helm's --set."""


def render(chosen: Chosen) -> str:
    """The manifests as YAML. Raises ConfigError with what helm says."""
    program = shutil.which("helm")
    if program is None:
        raise ConfigError("there is no helm on the PATH")
    options = [*(f"--values={file}" for file in chosen.values), *(f"--set={one}" for one in chosen.sets)]
    command = [program, "template", chosen.release, str(chosen.chart), f"--namespace={chosen.namespace}", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as exc:
        raise ConfigError(f"helm did not render the chart within {_TIMEOUT_S} s") from exc
    if done.returncode != 0:
        raise ConfigError(_sentence(done.stderr))
    return done.stdout


def documents_of(text: str) -> list[dict[str, Any]]:
    """The manifests; `helm test` pods are among them."""
    return [document for document in yaml.load_all(text, Loader=_LOADER) if document]


def text_of(documents: Sequence[dict[str, Any]]) -> str:
    """The other way."""
    return str(yaml.dump_all(documents, Dumper=_DUMPER))


def _sentence(said: str) -> str:
    """What the chart refuses with, without where in the templates that is; the schema's complaints have lines of their own."""
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith(("walk.go", "Use --debug"))]
    text = " ".join(line.strip() for line in lines) or "helm failed without a word"
    return text.partition("): ")[2] or text.removeprefix("Error: ")


def without_hooks(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an install makes at once."""
    return [one for one in documents if "helm.sh/hook" not in one["metadata"].get("annotations", {})]
