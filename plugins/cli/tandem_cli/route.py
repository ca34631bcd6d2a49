# SPDX-License-Identifier: Apache-2.0
"""`tandem route`: where the router would send a prompt, and what each candidate would cost, term by term. Nothing is generated."""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tandem_cli.client import GenerationClient
from tandem_cli.messages import GenerationRequest
from tandem_cli.turn import positive_float, print_json
from tandem_protocol.errors import EngineError

QUERY = {"router_query": True}
_COLUMNS = ("", "worker", "cost", "prefill", "hits gpu/cpu/storage", "left", "decode", "active")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("prompt", help="the prompt, sent as it is; - reads standard input")
    parser.add_argument("--url", default="localhost:8001", help="Triton's gRPC address (default: %(default)s)")
    parser.add_argument("--model", default="router", help="the router's model name (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--timeout-s", type=positive_float, default=60.0, help="deadline in seconds (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    answer = asyncio.run(_ask(args, prompt))
    if args.json:
        print_json(answer)
    else:
        print("\n".join(lines(answer)))
    return 0


async def _ask(args: argparse.Namespace, prompt: str) -> dict[str, Any]:
    async with GenerationClient(args.url) as client:
        request = GenerationRequest(model=args.model, prompt=prompt, returns=(), timeout_s=args.timeout_s, parameters=QUERY)
        return await query(client, request)


async def query(client: GenerationClient, request: GenerationRequest) -> dict[str, Any]:
    """The router's answer to a query. Raises EngineError if the model answers something else: it is no router."""
    text = "".join([delta.text async for delta in client.stream(request)])
    try:
        return dict(json.loads(text))
    except ValueError as exc:
        raise EngineError(f"model {request.model} did not answer as a router does: name the router with --model") from exc


def lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """The answer for people; costs are in blocks."""
    worker, prefill = answer["worker"], answer["prefill"]
    yield f"{answer['isl']} tokens, {answer['blocks']} full blocks"
    yield f"generate on {_address(worker)}: {worker['cached_tokens']} tokens cached, {worker['non_cached_tokens']} to compute"
    yield from _table(worker["candidates"])
    if prefill["remote"]:
        yield f"prefill on {_address(prefill['worker'])}: {prefill['reason']}"
        yield from _table(prefill["worker"]["candidates"])
    else:
        yield f"no remote prefill: {prefill['reason']}"


def _address(worker: Mapping[str, Any]) -> str:
    return f"{worker['triton_model']} at {worker['grpc_url']} ({worker['id']})"


def _table(candidates: list[dict[str, Any]]) -> Iterator[str]:
    rows = [_COLUMNS, *(_row(one) for one in sorted(candidates, key=lambda one: float(one["cost"])))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    hits = "/".join(str(count) for count in one["hits"])
    prefill, left, decode = (f"{one[name]:.1f}" for name in ("prefill_blocks", "adjusted_prefill_blocks", "decode_blocks"))
    worker, mark = f"{one['worker_id']}/{one['dp_rank']}", "*" if one["chosen"] else ""
    return mark, worker, f"{one['cost']:.1f}", prefill, hits, left, decode, str(one["active_requests"])
