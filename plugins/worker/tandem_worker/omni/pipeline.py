# SPDX-License-Identifier: Apache-2.0
"""What the worker needs of a running pipeline. `async_omni` is the real one; tests have one without engines."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tandem_worker.omni.outputs import StageOutput
from tandem_worker.omni.terms import Stage


@dataclass(frozen=True)
class Order:
    """One request, as a pipeline takes it."""

    request_id: str
    prompt: Mapping[str, Any]
    sampling: Sequence[Mapping[str, Any]]
    """What it sets of each stage's parameters, in the order of the stages."""
    modalities: tuple[str, ...]
    streamed: bool
    """Outputs bring what is new; else each stage gives one, with all."""


class Pipeline(Protocol):
    """A pipeline that was started. Everything but `shutdown` is called on one event loop."""

    @property
    def stages(self) -> Sequence[Stage]:
        """In the order of their ids."""

    @property
    def errored(self) -> bool:
        """Whether it is dead as a whole, so that no request can ever be served again."""

    @property
    def on_cpu(self) -> bool:
        """Whether its stages compute on processors, so that the time that they use tells whether they do."""

    @property
    def tells_steps(self) -> bool:
        """Whether all its stages are counted in `steps`, so that work without any is suspicious."""

    @property
    def steps(self) -> int:
        """How many steps the engines of its stages have told of. Cheap enough for a look each second."""

    def generate(self, order: Order) -> AsyncGenerator[StageOutput, None]:
        """Outputs of its final stages as they come; its end is the request's.

        Resource handling: closing the generator, or cancelling who waits on it, aborts the request in all stages.
        Raises RequestError for what the stages refuse, EngineError for a failure of this request, UnavailableError when it is dead.
        """

    async def check_health(self) -> None:
        """Raises UnavailableError with the reason when a stage has nobody left who serves it."""

    def shutdown(self, timeout: float) -> None:
        """Ends all stages; blocks. Called from the thread that started it."""
