# SPDX-License-Identifier: Apache-2.0
"""`tandem generate`: one prompt, one answer, token by token. Ctrl-C aborts it on the server."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem_cli.client import GenerationClient
from tandem_cli.messages import MEDIA_SUFFIXES, GenerationRequest
from tandem_cli.route import QUERY, query
from tandem_cli.templates import Message, RawTemplate, Template
from tandem_cli.turn import DEFAULT_SAMPLING, Tally, add_turn_arguments, build_request, conversation, find_target, run_turn
from tandem_protocol.errors import ConfigError, EngineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("prompt", help="what to say; - reads standard input")
    add_turn_arguments(parser)
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="print tokens as they come (default: yes)")
    parser.add_argument("--direct", action="store_true",
                        help="ask the router for the worker and call that one itself: no token passes through the router")
    parser.add_argument("--raw", action="store_true", help="send the prompt as it is, without a chat template")
    parser.add_argument("--sampling", type=json_object, metavar="JSON", help="further sampling parameters, e.g. '{\"seed\": 1}'")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="where an image (.png) or a sound (.wav) goes; further ones get a number, and the answer comes in one piece")


def json_object(text: str) -> dict[str, Any]:
    """For argparse: names and values."""
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if args.raw and (args.system or args.tokenizer or args.chatml):
        raise ConfigError("--raw sends the prompt as it is: leave out --system, --tokenizer and --chatml")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {args.output.absolute().parent} for --output: make it first")
    asyncio.run(_generate(args, sys.stdin.read() if args.prompt == "-" else args.prompt))
    return 0


async def _generate(args: argparse.Namespace, prompt: str) -> None:
    async with GenerationClient(args.url) as client:
        target = await find_target(client, args, raw=args.raw)
        template = target.template or _without_template(target.model, args.system)
        text = template.render(conversation(args.system, [Message("user", prompt)]))
        defaults = {} if target.is_pipeline else DEFAULT_SAMPLING
        request = build_request(args, target.model, text, stream=args.stream and args.output is None, defaults=defaults)
        if args.direct:
            await _run_direct(client, request, template.name, as_json=args.json)
        else:
            keep(await run_turn(client, request, template.name, as_json=args.json), args.output)


def keep(tally: Tally, target: Path | None) -> None:
    """Writes the answer's images and sounds, and says where on standard error. Raises EngineError where one was expected and none came."""
    if target is None:
        if tally.files:
            print(f"tandem: {len(tally.files)} files (images or sound) are not shown: give --output FILE", file=sys.stderr)
        return
    if not tally.files:
        raise EngineError(f"model {tally.request.model} answered with neither image nor sound, so nothing was written to {target}")
    for path, (_, content) in zip(paths(target, [suffix for suffix, _ in tally.files]), tally.files, strict=True):
        path.write_bytes(content)
        print(f"tandem: {path}, {len(content)} bytes", file=sys.stderr)


def paths(target: Path, suffixes: Sequence[str]) -> list[Path]:
    """A path for each file, by its format: `cat.png`, `cat-1.png`, `cat.wav`."""
    stem = target.with_suffix("") if target.suffix in MEDIA_SUFFIXES.values() else target
    counts = [suffixes[:i].count(suffix) for i, suffix in enumerate(suffixes)]
    return [stem.with_name(f"{stem.name}{f'-{count}' if count else ''}{suffix}") for count, suffix in zip(counts, suffixes, strict=True)]


async def _run_direct(client: GenerationClient, request: GenerationRequest, template: str, *, as_json: bool) -> None:
    """Asks the router where, then goes there. The router doesn't know of the request's load and can't move it when the worker dies."""
    answer = await query(client, replace(request, returns=(), parameters=QUERY))
    if answer["prefill"]["remote"]:
        raise ConfigError(f"--direct is for workers that prefill by themselves ({answer['prefill']['reason']}): leave it out")
    worker = answer["worker"]
    print(f"tandem: {worker['triton_model']} at {worker['grpc_url']}, {worker['cached_tokens']} tokens cached", file=sys.stderr)
    async with GenerationClient(worker["grpc_url"]) as direct:
        await run_turn(direct, replace(request, model=worker["triton_model"]), template, as_json=as_json)


def _without_template(model: str, system: str | None) -> Template:
    """A prompt alone can go as it is, and the user is told; a system message can't."""
    if system:
        raise ConfigError(f"no chat template is known for model {model}: give its folder with --tokenizer, or --chatml")
    print(f"tandem: no chat template is known for model {model}, the prompt goes as it is (--raw says this is meant)", file=sys.stderr)
    return RawTemplate()
