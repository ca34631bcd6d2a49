# SPDX-License-Identifier: Apache-2.0
"""Every way to ask gets Paris."""

import json
import subprocess
import urllib.request
from typing import Any

import pytest

from calls import PARIS_PROMPT, Call, prefill, text_of
from servers import Server, tandem

GREEDY = {"temperature": 0, "max_tokens": 24}
ANSWER = "The capital of France is Paris."


@pytest.mark.parametrize("model", ["vllm", "disagg", "decode"])
async def test_grpc_stream(client: Any, model: str) -> None:
    """A gRPC stream answers, token by token."""
    assert await text_of(client, Call(model, sampling=GREEDY)) == ANSWER


async def test_prefill_then_decode_by_hand(client: Any) -> None:
    """The two legs of a disaggregated request can be called one after the other."""
    handoff = await prefill(client, Call("prefill", sampling=GREEDY))
    assert await text_of(client, Call("decode", sampling=GREEDY, handoff=handoff)) == ANSWER


@pytest.mark.parametrize("model", ["vllm", "disagg"])
def test_http_generate(server: Server, model: str) -> None:
    """HTTP generate answers in one piece, with the prompt in front as vllm_backend has it."""
    body = {"text_input": PARIS_PROMPT, "parameters": GREEDY}
    assert _post(f"{server.http_url}/v2/models/{model}/generate", body)["text_output"] == PARIS_PROMPT + ANSWER


@pytest.mark.parametrize("model", ["vllm", "disagg"])
def test_http_generate_stream(server: Server, model: str) -> None:
    """HTTP generate_stream answers as server-sent events."""
    body = json.dumps({"text_input": PARIS_PROMPT, "stream": True, **GREEDY}).encode()
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{model}/generate_stream", data=body, timeout=60) as response:
        events = [json.loads(line[6:]) for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert len(events) > 4
    assert "".join(event["text_output"] for event in events) == ANSWER


def test_cli_generate(server: Server) -> None:
    """`tandem generate` renders the chat template, streams, and prints the answer alone when it is not a terminal."""
    done = tandem(server.run_dir, "generate", "What is the capital of France?", "--url", server.grpc_url, "--max-tokens", "24",
                  timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_cli_generate_json(server: Server) -> None:
    """`tandem generate --json` ends with a summary object."""
    done = _json(tandem(server.run_dir, "generate", "What is the capital of France?", "--url", server.grpc_url, "--max-tokens", "24",
                        "--model", "vllm", "--no-stream", "--json", timeout_s=120))
    assert "Paris" in done["text"]
    assert done["num_output_tokens"] > 3


def test_cli_status(server: Server) -> None:
    """`tandem status --json` lists every model with role and load."""
    admin_port = server.admin_url("vllm").rsplit(":", 1)[1]
    done = tandem(server.run_dir, "status", "--url", server.grpc_url, "--admin-port", admin_port, "--json", timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert {"vllm", "prefill", "decode", "disagg"} <= set(_names(json.loads(done.stdout)))


def _names(status: Any) -> list[str]:
    rows = status["models"] if isinstance(status, dict) else status
    return [str(row.get("name", row.get("model"))) for row in rows]


def _json(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    with urllib.request.urlopen(url, data=json.dumps(body).encode(), timeout=60) as response:
        return dict(json.loads(response.read()))
