# SPDX-License-Identifier: Apache-2.0
"""`tandem chat`: a conversation with any running server. On a pipe, every line of standard input is one user turn.

Each turn runs under its own event loop, so that Ctrl-C aborts an answer and not the conversation.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from tandem_cli.client import GenerationClient
from tandem_cli.templates import Message, Template
from tandem_cli.turn import add_turn_arguments, build_request, conversation, find_target, run_turn
from tandem_protocol.errors import ConfigError, TandemError

_RESET, _EXIT = "/reset", "/exit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_turn_arguments(parser)


@dataclass
class Chat:
    """A conversation; a turn enters `history` only when its answer is complete."""

    args: argparse.Namespace
    model: str
    template: Template
    history: list[Message] = field(default_factory=list)

    async def turn(self, text: str) -> None:
        """One user turn and its answer."""
        turns = [*self.history, Message("user", text)]
        prompt = self.template.render(conversation(self.args.system, turns))
        async with GenerationClient(self.args.url) as client:
            request = build_request(self.args, self.model, prompt, stream=True)
            answer = await run_turn(client, request, self.template.name, as_json=self.args.json)
        self.history = [*turns, Message("assistant", answer.text)]


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    interactive = sys.stdin.isatty()
    chat = asyncio.run(_open(args))
    if interactive:
        print(f"{chat.model} at {args.url}; {_RESET} forgets the conversation, {_EXIT} or Ctrl-D leaves", file=sys.stderr)
    for line in _lines(interactive):
        if line == _EXIT:
            break
        if line == _RESET:
            chat.history = []
        elif line:
            _say(chat, line, interactive)
    return 0


async def _open(args: argparse.Namespace) -> Chat:
    async with GenerationClient(args.url) as client:
        target = await find_target(client, args)
    if target.template is None:
        raise ConfigError(f"no chat template is known for model {target.model}: give its folder with --tokenizer, or --chatml")
    return Chat(args, target.model, target.template)


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # line editing; some Python builds have none
        import readline  # noqa: F401 - its import changes what input() does
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return


def _say(chat: Chat, text: str, interactive: bool) -> None:
    """At a terminal a failed or stopped turn is dropped and the conversation goes on; a script ends with the error."""
    try:
        asyncio.run(chat.turn(text))
    except KeyboardInterrupt:
        if not interactive:
            raise
        print("\n(stopped)", file=sys.stderr)
    except TandemError as exc:
        if not interactive:
            raise
        print(f"tandem: {exc}", file=sys.stderr)
