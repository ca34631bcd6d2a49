# SPDX-License-Identifier: Apache-2.0
"""One turn of `tandem generate` and `tandem chat`: options, the model and template it goes to, its output and summary."""

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from tandem_cli.client import GenerationClient
from tandem_cli.messages import Delta, GenerationRequest
from tandem_cli.templates import Message, Template, choose_template
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.roles import Role

PREFERRED_MODELS = ("router", "disagg", "vllm", "omni")
"""What `--model` defaults to: the first of these that is ready."""
DEFAULT_SAMPLING: Mapping[str, Any] = {"max_tokens": 256, "temperature": 0.0}
"""Greedy, so that answers repeat. A pipeline of vllm-omni keeps to its own: a stage that makes images knows neither."""


def add_turn_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that one prompt and a conversation have in common."""
    parser.add_argument("--url", default="localhost:8001", help="Triton's gRPC address (default: %(default)s)")
    parser.add_argument("--model", help=f"Triton model to ask (default: the first that is ready of {', '.join(PREFERRED_MODELS)})")
    parser.add_argument("--max-tokens", type=positive_int, help="most tokens of an answer (default: 256)")
    parser.add_argument("--temperature", type=temperature, help="0 is greedy, so that answers repeat (default: 0)")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--tokenizer", metavar="PATH", help="model folder with the chat template (default: what the server names)")
    parser.add_argument("--chatml", action="store_true", help="use ChatML, whatever the model")
    parser.add_argument("--json", action="store_true", help="print JSON objects, one per line")
    parser.add_argument("--timeout-s", type=positive_float, default=300.0, help="deadline of an answer in seconds (default: %(default)s)")


def positive_int(text: str) -> int:
    """For argparse: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def positive_float(text: str) -> float:
    """For argparse: a number above 0 and below a day's worth of seconds, which keeps infinity and NaN out."""
    if not 0 < (value := float(text)) <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 86400")
    return value


def temperature(text: str) -> float:
    """For argparse: what vLLM takes as a temperature."""
    if not 0 <= (value := float(text)) <= 2:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2")
    return value


@dataclass(frozen=True)
class Target:
    """Which model a turn goes to, and by which template; None means that no template is known for it."""

    model: str
    template: Template | None
    is_pipeline: bool = False
    """Whether it is one of vllm-omni's."""


async def find_target(client: GenerationClient, args: argparse.Namespace, *, raw: bool = False) -> Target:
    """Asks the server once; the answer holds for all turns of a conversation."""
    model = args.model or await _default_model(client)
    parameters: dict[str, str] = {}
    for info in reversed(await client.tree(model)):
        parameters.update({name: value for name, value in info.parameters.items() if value})
    template = await asyncio.to_thread(choose_template, parameters, raw=raw, chatml=args.chatml, tokenizer=args.tokenizer)
    return Target(model, template, parameters.get("role") == Role.OMNI)


async def _default_model(client: GenerationClient) -> str:
    ready = [entry.name for entry in await client.index() if entry.ready]
    if not ready:
        raise UnavailableError(f"no model is ready at {client.url}: `tandem status` tells why")
    for name in PREFERRED_MODELS:
        if name in ready:
            return name
    raise ConfigError(f"none of {', '.join(PREFERRED_MODELS)} is ready at {client.url}: pick one of {', '.join(ready)} with --model")


def build_request(args: argparse.Namespace, model: str, prompt: str, *, stream: bool,
                  defaults: Mapping[str, Any] = DEFAULT_SAMPLING) -> GenerationRequest:
    """The request for one prompt under these options."""
    given = {name: value for name in DEFAULT_SAMPLING if (value := getattr(args, name)) is not None}
    sampling = {**defaults, **given, **(getattr(args, "sampling", None) or {})}
    return GenerationRequest(model=model, prompt=prompt, sampling=sampling, stream=stream, timeout_s=args.timeout_s)


def conversation(system: str | None, turns: Sequence[Message]) -> list[Message]:
    """The turns, after the system message if there is one."""
    return [Message("system", system), *turns] if system else list(turns)


@dataclass
class Tally:
    """Adds up the deltas of one answer. Times come from `clock`, in seconds."""

    request: GenerationRequest
    template: str
    clock: Callable[[], float] = time.perf_counter
    text: str = ""
    finish_reason: str | None = None
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    files: list[tuple[str, bytes]] = field(default_factory=list)
    """Images and sounds, each with the suffix of its format."""
    ttft_s: float | None = None
    started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self.clock()

    def add(self, delta: Delta) -> None:
        """Takes the next delta; an empty final one is not a first token."""
        if self.ttft_s is None and delta.outputs:
            self.ttft_s = self.clock() - self.started_s
        self.text += delta.text
        self.files += delta.files
        self.finish_reason = delta.finish_reason or self.finish_reason
        if delta.num_input_tokens is not None:
            self.num_input_tokens = delta.num_input_tokens
        if delta.num_output_tokens is not None:
            self.num_output_tokens = (self.num_output_tokens or 0) + delta.num_output_tokens

    def summary(self) -> dict[str, Any]:
        """The last object of `--json`; times in ms since the request was sent."""
        duration_s = self.clock() - self.started_s
        return {
            "event": "summary", "request_id": self.request.request_id, "model": self.request.model, "template": self.template,
            "text": self.text, "finish_reason": self.finish_reason,
            "num_input_tokens": self.num_input_tokens, "num_output_tokens": self.num_output_tokens,
            "ttft_ms": None if self.ttft_s is None else round(self.ttft_s * 1e3, 1), "duration_ms": round(duration_s * 1e3, 1),
        }


async def run_turn(client: GenerationClient, request: GenerationRequest, template: str, *, as_json: bool) -> Tally:
    """Sends one request and prints its answer as it comes."""
    tally = Tally(request, template)
    async with aclosing(client.stream(request)) as deltas:
        async for delta in deltas:
            tally.add(delta)
            if not as_json:
                print(delta.text, end="", flush=True)
            elif request.stream and delta.outputs:
                print_json(delta_object(delta))
    if as_json:
        print_json(tally.summary())
    else:
        print(flush=True)
    return tally


def delta_object(delta: Delta) -> dict[str, Any]:
    """One delta of `--json`."""
    return {"event": "delta", "text": delta.text, "num_output_tokens": delta.num_output_tokens, "finish_reason": delta.finish_reason}


def print_json(value: Mapping[str, Any]) -> None:
    """One object on one line, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)
