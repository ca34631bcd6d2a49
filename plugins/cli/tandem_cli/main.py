# SPDX-License-Identifier: Apache-2.0
"""The `tandem` command: finds the subcommand, runs it, and turns errors into one sentence and an exit code."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tandem_protocol import logs
from tandem_protocol.errors import ConfigError, TandemError
from tandem_protocol.version import VERSION

EXIT_ERROR, EXIT_MISUSE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141


@dataclass(frozen=True)
class Subcommand:
    """Where a subcommand lives: a module with `add_arguments(parser)` and `run(args) -> int`, imported when it is used."""

    module: str
    summary: str
    passthrough: bool = False
    """Whether arguments that it doesn't know are handed to it as `args.passthrough` instead of being refused."""


SUBCOMMANDS = {
    "serve": Subcommand("tandem_cli.serve.command_serve", "start Triton with vLLM workers", passthrough=True),
    "stop": Subcommand("tandem_cli.serve.command_stop", "stop what `tandem serve` started"),
    "model": Subcommand("tandem_cli.serve.command_model", "print the folder of the embedded model"),
    "generate": Subcommand("tandem_cli.generate", "answer one prompt"),
    "chat": Subcommand("tandem_cli.chat", "hold a conversation"),
    "route": Subcommand("tandem_cli.route", "explain where the router would send a prompt"),
    "lora": Subcommand("tandem_cli.lora", "load, unload and list LoRA adapters"),
    "plan": Subcommand("tandem_cli.plan", "how many workers a load needs, term by term"),
    "profile": Subcommand("tandem_cli.profile.command", "measure what a server can do, for the planner", passthrough=True),
    "simulate": Subcommand("tandem_cli.simulate", "what a planner would do to a simulated fleet"),
    "doctor": Subcommand("tandem_cli.doctor.command", "look whether this host can serve"),
    "check-cluster": Subcommand("tandem_cli.check_cluster.command", "look whether a Kubernetes cluster can take the chart"),
    "status": Subcommand("tandem_cli.status", "show models and workers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code: 2 for misuse, 1 for other failures, 130 after Ctrl-C."""
    try:
        logs.configure("tandem", "tandem_cli", default=logging.WARNING)
        return _dispatch(sys.argv[1:] if argv is None else list(argv))
    except TandemError as exc:
        print(f"tandem: {exc}", file=sys.stderr)
        return EXIT_MISUSE if isinstance(exc, ConfigError) else EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return EXIT_BROKEN_PIPE


def _dispatch(argv: list[str]) -> int:
    front = _front_parser().parse_args(argv[:1])
    subcommand = SUBCOMMANDS[front.subcommand]
    module: Any = importlib.import_module(subcommand.module)
    parser = argparse.ArgumentParser(prog=f"tandem {front.subcommand}", description=module.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    code = int(module.run(_parse(parser, argv[1:], passthrough=subcommand.passthrough)))
    sys.stdout.flush()  # here, so that a reader who went away is noticed while it can still be handled
    return code


def _parse(parser: argparse.ArgumentParser, argv: list[str], *, passthrough: bool) -> argparse.Namespace:
    if not passthrough:
        return parser.parse_args(argv)
    args, unknown = parser.parse_known_args(argv)
    args.passthrough = unknown
    return args


def _front_parser() -> argparse.ArgumentParser:
    summaries = "\n".join(f"  {name:<14}{subcommand.summary}" for name, subcommand in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tandem", description=f"Disaggregated LLM serving on Triton with vLLM.\n\nsubcommands:\n{summaries}",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="`tandem SUBCOMMAND --help` tells its options.",
    )
    parser.add_argument("--version", action="version", version=f"tandem {VERSION}")
    parser.add_argument("subcommand", choices=tuple(SUBCOMMANDS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
