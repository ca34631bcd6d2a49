# SPDX-License-Identifier: Apache-2.0
"""The command line of the planner's process: every setting of its two dataclasses as a flag, a variable, or its default."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem_planner.config import PlannerConfig, load_config
from tandem_planner.service_config import ServiceSettings
from tandem_protocol.settings import parse_bool, resolve, specs_of


@dataclass(frozen=True)
class Chosen:
    """What was chosen."""

    config: PlannerConfig
    service: ServiceSettings


def parse(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> Chosen:
    """Flags first, then the environment, then defaults. Raises ConfigError; argparse itself ends the process for unknown flags."""
    environ = os.environ if environ is None else environ
    given = {name: text for name, text in vars(_parser().parse_args(argv)).items() if text is not None}
    specs = specs_of(ServiceSettings)
    service = {**environ, **{specs[name].env: text for name, text in given.items() if name in specs}}
    flags = {name: text for name, text in given.items() if name not in specs}
    return Chosen(load_config(flags, environ), resolve(ServiceSettings, {}, service))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tandem_planner", description="Keeps latency targets by scaling workers.")
    for title, kind in (("what is decided", PlannerConfig), ("where it looks and whom it tells", ServiceSettings)):
        _add(parser.add_argument_group(title), kind)
    return parser


def _add(group: Any, kind: type[Any]) -> None:
    for name, spec in specs_of(kind).items():
        if spec.flag:
            told = f"{spec.help} ({spec.env}{f', {spec.unit}' if spec.unit else ''})".replace("%", "%%")
            switch = {"nargs": "?", "const": "true"} if spec.parse is parse_bool else {}
            group.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=told, **switch)
