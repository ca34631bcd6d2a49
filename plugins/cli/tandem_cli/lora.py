# SPDX-License-Identifier: Apache-2.0
"""`tandem lora`: loads, unloads and lists LoRA adapters on the workers of one server, or of all servers of a discovery.

All workers are asked at once: a router uses an adapter on those that have it, and prefill and decode both need it. The admin
servers listen on loopback unless told otherwise.
"""

import argparse
import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp

from tandem_cli.client import GenerationClient
from tandem_cli.turn import positive_float, print_json
from tandem_protocol.discovery import open_discovery
from tandem_protocol.errors import EngineError, TandemError, UnavailableError


@dataclass(frozen=True)
class Target:
    """A worker and its admin server."""

    worker: str
    admin_url: str


@dataclass(frozen=True)
class Outcome:
    """What one worker answered. `ok` is false for a refusal, and for none at all."""

    worker: str
    admin_url: str
    ok: bool
    message: str
    loras: dict[str, int] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions and options."""
    actions = parser.add_subparsers(dest="action", required=True)
    load = actions.add_parser("load", help="load an adapter")
    load.add_argument("name", help="what requests will call it (lora_name)")
    load.add_argument("uri", help="file:///folder, s3://bucket/prefix or hf://org/name; a folder, or an archive of it")
    actions.add_parser("unload", help="unload an adapter").add_argument("name")
    actions.add_parser("list", help="list the adapters of each worker")
    for action in actions.choices.values():
        action.add_argument("--url", default="localhost:8001", help="Triton's gRPC address (default: %(default)s)")
        action.add_argument("--admin-port", type=int, default=8081, help="admin port of worker 0; worker n adds n to it (default: 8081)")
        action.add_argument("--discovery", default="", help="all workers of this discovery instead: file:/folder, etcd://..., kubernetes")
        action.add_argument("--timeout-s", type=positive_float, default=660.0, help="deadline in seconds (default: %(default)s)")
        action.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Raises EngineError, after printing, if any worker did not do it."""
    outcomes = asyncio.run(_ask_all(args))
    if args.json:
        print_json({"action": args.action, "workers": [dataclasses.asdict(outcome) for outcome in outcomes]})
    else:
        print("\n".join(line for outcome in outcomes for line in lines(outcome, args.action)))
    failed = [outcome.worker for outcome in outcomes if not outcome.ok]
    if failed:
        raise EngineError(f"{len(failed)} of {len(outcomes)} workers did not {args.action}: {', '.join(failed)}")
    return 0


def lines(outcome: Outcome, action: str) -> Sequence[str]:
    """An outcome for people."""
    if action == "list" and outcome.ok:
        return [f"{outcome.worker}: {len(outcome.loras)} adapters",
                *(f"  {name} ({number}) from {outcome.sources.get(name, '?')}" for name, number in outcome.loras.items())]
    return [f"{outcome.worker}: {'' if outcome.ok else 'FAILED: '}{outcome.message}"]


async def _ask_all(args: argparse.Namespace) -> list[Outcome]:
    targets = await (_discovered(args.discovery) if args.discovery else _of_server(args.url, args.admin_port))
    if not targets:
        raise UnavailableError("no worker with an admin server is known: name the server with --url, or the fleet with --discovery")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=args.timeout_s)) as http:
        return list(await asyncio.gather(*(ask(http, target, args.action, vars(args)) for target in targets)))


async def _discovered(url: str) -> list[Target]:
    discovery = open_discovery(url)
    try:
        return [Target(record.id, record.admin_url) for record in await discovery.list() if record.admin_url]
    finally:
        await discovery.close()


async def _of_server(url: str, admin_port: int) -> list[Target]:
    """The workers among a server's models: those with a role."""
    host = url.rpartition(":")[0]
    targets = []
    async with GenerationClient(url) as client:
        for entry in await client.index():
            if not entry.ready:
                continue
            parameters = (await client.info(entry.name)).parameters
            if parameters.get("role"):
                targets.append(Target(entry.name, f"http://{host}:{admin_port + int(parameters.get('worker_index', '0'))}"))
    return targets


async def ask(http: aiohttp.ClientSession, target: Target, action: str, args: dict[str, Any]) -> Outcome:
    """One worker's answer; never raises for what goes wrong there."""
    try:
        method, path, body = request_of(action, args)
        async with http.request(method, f"{target.admin_url}{path}", json=body) as response:
            answer = await response.json(content_type=None)
            return _outcome(target, answer, ok=response.status == 200)
    except (aiohttp.ClientError, TimeoutError, TandemError, ValueError) as exc:
        reason = str(exc) or "no answer in time"
        return Outcome(target.worker, target.admin_url, ok=False, message=f"{target.admin_url} does not answer: {reason}")


def request_of(action: str, args: dict[str, Any]) -> tuple[str, str, dict[str, Any] | None]:
    """Method, path and body of the admin request."""
    if action == "load":
        return "POST", "/v1/loras", {"lora_name": args["name"], "source": {"uri": args["uri"]}}
    if action == "unload":
        return "DELETE", f"/v1/loras/{quote(args['name'], safe='/')}", None
    return "GET", "/v1/loras", None


def _outcome(target: Target, answer: Any, *, ok: bool) -> Outcome:
    if not isinstance(answer, dict):
        return Outcome(target.worker, target.admin_url, ok=False, message="the answer is not a worker's")
    message = str(answer.get("message") or ("" if ok else answer))
    return Outcome(target.worker, target.admin_url, ok, message, answer.get("loras", {}), answer.get("sources", {}))
