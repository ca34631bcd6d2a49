# SPDX-License-Identifier: Apache-2.0
"""`tandem generate`: one prompt, one answer, token by token. Ctrl-C aborts it on the server."""

import argparse
import asyncio
import sys
from dataclasses import replace

from tandem_cli.client import GenerationClient
from tandem_cli.messages import GenerationRequest
from tandem_cli.route import QUERY, query
from tandem_cli.templates import Message, RawTemplate, Template
from tandem_cli.turn import add_turn_arguments, build_request, conversation, find_target, run_turn
from tandem_protocol.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("prompt", help="what to say; - reads standard input")
    add_turn_arguments(parser)
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="print tokens as they come (default: yes)")
    parser.add_argument("--direct", action="store_true",
                        help="ask the router for the worker and call that one itself: no token passes through the router")
    parser.add_argument("--raw", action="store_true", help="send the prompt as it is, without a chat template")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if args.raw and (args.system or args.tokenizer or args.chatml):
        raise ConfigError("--raw sends the prompt as it is: leave out --system, --tokenizer and --chatml")
    asyncio.run(_generate(args, sys.stdin.read() if args.prompt == "-" else args.prompt))
    return 0


async def _generate(args: argparse.Namespace, prompt: str) -> None:
    async with GenerationClient(args.url) as client:
        target = await find_target(client, args, raw=args.raw)
        template = target.template or _without_template(target.model, args.system)
        text = template.render(conversation(args.system, [Message("user", prompt)]))
        request = build_request(args, target.model, text, stream=args.stream)
        if args.direct:
            await _run_direct(client, request, template.name, as_json=args.json)
        else:
            await run_turn(client, request, template.name, as_json=args.json)


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
