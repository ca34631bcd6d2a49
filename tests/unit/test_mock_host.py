# SPDX-License-Identifier: Apache-2.0
"""The mock worker as Triton's models have it, without Triton: what it answers in every role."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from servers import get_text, wait_for
from tandem_protocol import handoff, tensors
from tandem_protocol.errors import ConfigError, RequestCancelledError, RequestError, TandemError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Arrays
from tandem_worker.mock.host import MockHost
from tandem_worker.mock.options import parse

WAIT_S = 20.0
PROMPT = list(range(100))


@dataclass
class FakeSink:
    """Keeps what it is sent."""

    sent: list[Arrays] = field(default_factory=list)
    error: TandemError | None = None
    begun: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    left: bool = False

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """A response."""
        self.sent.append(arrays)
        self.begun.set()
        if final:
            self.over.set()

    def fail(self, error: TandemError) -> None:
        """The end by an error."""
        self.error = error
        self.over.set()

    def is_cancelled(self) -> bool:
        """Whether the client went away."""
        return self.left


@contextmanager
def host(arguments: str = "") -> Iterator[MockHost]:
    """A started host, on ports of its own, in no discovery."""
    one = MockHost(parse(["--no-events", "--speedup", "20", *arguments.split()]), "mock", "127.0.0.1:1")
    one.start()
    try:
        yield one
    finally:
        one.stop()


def request(name: str, tokens: int = 4, handed: dict[str, Any] | None = None) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt=PROMPT, images=(), stream=True, prepend_input=False, sampling={"max_tokens": tokens},
                             returns=frozenset({tensors.OUTPUT_IDS}), handoff=handed, priority=0, timeout_s=WAIT_S)


def asked(one: MockHost, what: GenerationRequest) -> FakeSink:
    """The sink after the request's end."""
    sink = FakeSink()
    one.submit(what, sink)
    assert sink.over.wait(WAIT_S)
    return sink


def held(params: dict[str, Any]) -> float:
    """The handoffs whose blocks a prefill worker still holds, by its metrics."""
    text = get_text(f"http://{params['remote_host']}:{params['remote_port']}/metrics")
    return float(next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith("tandem_mock_held_handoffs{")))


def test_prefill_answers_once_and_decode_frees_its_blocks() -> None:
    """The two are different processes in a fleet: the release goes over the admin port."""
    with host("--role prefill") as prefill, host("--role decode") as decode:
        answered = asked(prefill, request("p"))
        assert len(answered.sent) == 1
        params = handoff.decode(answered.sent[0][tensors.KV_TRANSFER_PARAMS][0])
        assert (params["remote_num_tokens"], held(params)) == (len(PROMPT), 1)
        generated = asked(decode, request("d", handed=params))
        assert sum(len(arrays[tensors.OUTPUT_IDS]) for arrays in generated.sent) == 4
        wait_for(lambda: held(params) == 0, WAIT_S, "the blocks are freed")


@pytest.mark.parametrize("role", ["prefill", "decode", "aggregated"])
def test_what_can_not_be_done_is_answered_with_its_error(role: str) -> None:
    """In every role; here a prompt that is too long."""
    with host(f"--role {role} --max-model-len 50") as one:
        sink = asked(one, request("r"))
    assert isinstance(sink.error, RequestError)
    assert sink.sent == []


def test_a_request_is_aborted_by_its_id() -> None:
    """As the router does when its own client left."""
    with host() as one:
        sink = FakeSink()
        one.submit(request("a", tokens=100_000), sink)
        assert sink.begun.wait(WAIT_S)
        one.abort("a")
        assert sink.over.wait(WAIT_S)
    assert isinstance(sink.error, RequestCancelledError)


def test_several_workers_are_refused() -> None:
    """A model is one worker."""
    with pytest.raises(ConfigError, match="is one worker"):
        MockHost(parse(["--workers", "2"]), "mock", "127.0.0.1:1")
