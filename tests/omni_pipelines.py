# SPDX-License-Identifier: Apache-2.0
"""A pipeline without engines: a text stage and an image stage that a test scripts, typed like the real one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tandem_protocol.errors import TandemError, UnavailableError
from tandem_worker.omni.pipeline import Order
from tandem_worker.omni.terms import Stage, StageKind


@dataclass
class Output:
    """vllm-omni's OmniRequestOutput, as far as it is read."""

    final_output_type: str = "text"
    outputs: list[Any] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    multimodal_output: Any = field(default_factory=dict)
    finished: bool = False
    error: str | None = None
    error_status_code: int | None = None
    prompt_token_ids: list[int] | None = None
    stage_id: int | None = None


def words(text: str, *ids: int, end: str | None = None) -> Output:
    """A text stage's next output."""
    return Output(outputs=[SimpleNamespace(text=text, token_ids=list(ids), finish_reason=end)], prompt_token_ids=[1, 2, 3])


@dataclass
class ScriptedPipeline:
    """Answers every request with `script`: outputs, and errors that it raises."""

    script: Sequence[Output | Exception] = ()
    endless: bool = False
    """After its outputs a request only waits."""
    stages: Sequence[Stage] = (
        Stage(0, StageKind.LLM, "thinker", "text", {"temperature": float, "max_tokens": int}),
        Stage(1, StageKind.DIFFUSION, "painter", "image", {"num_inference_steps": int, "seed": int}),
    )
    errored: bool = False
    on_cpu: bool = True
    tells_steps: bool = True
    steps: int = 0
    failure: Exception | None = None
    """Of the next look at its health."""
    sick: str = ""
    """Why it is not healthy."""
    orders: list[Order] = field(default_factory=list)
    ordered: asyncio.Event = field(default_factory=asyncio.Event)
    closed: list[str] = field(default_factory=list)
    """Requests of which nothing is left, by their ids."""
    ended: bool = False

    async def generate(self, order: Order) -> AsyncGenerator[Output, None]:
        """As Pipeline says."""
        self.orders.append(order)
        self.ordered.set()
        try:
            for one in self.script:
                if isinstance(one, Exception):
                    raise one
                yield one
            if self.endless:
                await asyncio.Event().wait()
        finally:
            self.closed.append(order.request_id)

    async def check_health(self) -> None:
        """Raises `failure` once, and while `sick`."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        if self.sick:
            raise UnavailableError(self.sick)

    def shutdown(self, timeout: float) -> None:
        """Remembers it."""
        assert timeout > 0
        self.ended = True


class RecordingSink:
    """Triton's response sender: responses as name -> list, then the error, if any."""

    def __init__(self) -> None:
        self.responses: list[dict[str, list[Any]]] = []
        self.error: TandemError | None = None

    def send(self, arrays: Any, *, final: bool) -> None:
        """Records one response."""
        self.responses.append({name: list(array) for name, array in arrays.items()})

    def fail(self, error: TandemError) -> None:
        """Records the error."""
        self.error = error

    def is_cancelled(self) -> bool:
        """Nobody goes away here."""
        return False
