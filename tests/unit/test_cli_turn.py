# SPDX-License-Identifier: Apache-2.0
"""`tandem generate` and `tandem chat`: options, the model they pick, what they print."""

import argparse
import asyncio
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fake_triton import FakeModel, FakeTriton, answer, delta, files, silence_after
from tandem_cli import chat, generate
from tandem_cli.chat import Chat
from tandem_cli.client import GenerationClient
from tandem_cli.main import main
from tandem_cli.messages import Delta, GenerationRequest
from tandem_cli.templates import ChatMLTemplate, Message
from tandem_cli.turn import Tally, conversation, find_target
from tandem_protocol.errors import ConfigError, EngineError, UnavailableError

HELLO = (delta("Hel"), delta("lo", finish_reason="stop"), delta(final=True))


def parsed(module: Any, *argv: str) -> argparse.Namespace:
    """Arguments of a subcommand."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(argv)


async def command(server: FakeTriton, *argv: str) -> int:
    """Runs a whole command against a fake server, on a thread, since it has an event loop of its own."""
    return await asyncio.to_thread(main, [argv[0], "--url", server.url, *argv[1:]])


def prompts(model: FakeModel) -> list[str]:
    """The prompts that a model was sent."""
    return [message.inputs[0].contents.bytes_contents[0].decode() for message in model.requests]


@pytest.mark.parametrize(
    "argv",
    [("--max-tokens", "0"), ("--max-tokens", "x"), ("--temperature", "-1"), ("--temperature", "nan"), ("--timeout-s", "inf"),
     ("--timeout-s", "0")],
)
def test_options_out_of_range_are_misuse(argv: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A value that the server would refuse, or that would never end, is refused at once."""
    with pytest.raises(SystemExit) as caught:
        parsed(generate, "hi", *argv)
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--system", "x"), ("--tokenizer", "x"), ("--chatml",)])
def test_raw_and_a_template_contradict(option: tuple[str, ...]) -> None:
    """Options that could have no effect are refused."""
    with pytest.raises(ConfigError, match="--raw"):
        generate.run(parsed(generate, "hi", "--raw", *option))


async def test_generate_prints_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain output is the text and one newline."""
    model = FakeModel(answer(*HELLO), parameters={"model": "SmolLM2"})
    async with FakeTriton({"vllm": model}) as server:
        assert await command(server, "generate", "Hi") == 0
    assert capsys.readouterr().out == "Hello\n"
    assert prompts(model) == [ChatMLTemplate().render([Message("user", "Hi")])]


async def test_generate_json_has_deltas_and_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """Each delta with outputs is an object, and the last object sums up."""
    async with FakeTriton({"vllm": FakeModel(answer(*HELLO))}) as server:
        assert await command(server, "generate", "Hi", "--json", "--raw") == 0
    *deltas, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["text"] for item in deltas] == ["Hel", "lo"]
    assert {name: summary[name] for name in ("text", "finish_reason", "num_input_tokens", "num_output_tokens", "template", "model")} == {
        "text": "Hello", "finish_reason": "stop", "num_input_tokens": 5, "num_output_tokens": 2, "template": "raw", "model": "vllm",
    }
    assert 0 <= summary["ttft_ms"] <= summary["duration_ms"]


async def test_generate_without_streaming_prints_the_summary_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """--no-stream asks the server for one response and prints one object."""
    model = FakeModel(answer(delta("Hello", finish_reason="stop", final=True)))
    async with FakeTriton({"vllm": model}) as server:
        assert await command(server, "generate", "Hi", "--raw", "--json", "--no-stream") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["event"] == "summary"
    assert not next(tensor for tensor in model.requests[0].inputs if tensor.name == "stream").contents.bool_contents[0]


def sampling(model: FakeModel) -> Any:
    """The sampling parameters that a model was sent last."""
    [tensor] = [one for one in model.requests[-1].inputs if one.name == "sampling_parameters"]
    return json.loads(tensor.contents.bytes_contents[0])


async def test_a_pipelines_files_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte by byte, in one response; a pipeline gets the sampling parameters that were given, and none of ours."""
    content = b"\x89PNG\xff\x00"
    omni = FakeModel(answer(files(image_output=content, audio_output=b"RIFF\xfe")), parameters={"role": "omni"})
    async with FakeTriton({"omni": omni}) as server:
        assert await command(server, "generate", "a cat", "--raw", "--sampling", '{"seed": 1}', "--output", str(tmp_path / "cat.png")) == 0
        assert await command(server, "generate", "a cat", "--raw") == 0
    assert (tmp_path / "cat.png").read_bytes() == content
    assert (tmp_path / "cat.wav").read_bytes() == b"RIFF\xfe"
    assert not next(tensor for tensor in omni.requests[0].inputs if tensor.name == "stream").contents.bool_contents[0]
    assert sampling(omni) == {}
    assert "2 files (images or sound) are not shown" in capsys.readouterr().err


async def test_sampling_parameters_lie_over_our_defaults() -> None:
    """Of a model that generates text."""
    model = FakeModel(answer(*HELLO))
    async with FakeTriton({"vllm": model}) as server:
        assert await command(server, "generate", "Hi", "--raw", "--temperature", "1", "--sampling", '{"seed": 1}') == 0
    assert sampling(model) == {"max_tokens": 256, "temperature": 1.0, "seed": 1}


@pytest.mark.parametrize("text", ["{", "[1]", "1"])
def test_sampling_parameters_that_are_no_json_object(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Are misuse."""
    with pytest.raises(SystemExit):
        parsed(generate, "hi", "--sampling", text)
    assert "JSON" in capsys.readouterr().err


async def test_an_output_that_gets_nothing_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model answers with text, or there is no such folder."""
    async with FakeTriton({"vllm": FakeModel(answer(*HELLO))}) as server:
        assert await command(server, "generate", "Hi", "--raw", "--output", str(tmp_path / "x")) == 1
        assert await command(server, "generate", "Hi", "--raw", "--output", str(tmp_path / "no" / "x")) == 2
    assert "neither image nor sound" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_files_are_named_by_their_format() -> None:
    """And numbered from the second on."""
    assert generate.paths(Path("d/cat.png"), [".png", ".png", ".wav"]) == [Path("d/cat.png"), Path("d/cat-1.png"), Path("d/cat.wav")]
    assert generate.paths(Path("v1.5"), [".wav"]) == [Path("v1.5.wav")]


async def test_generate_reads_the_prompt_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` takes all of it, as it is."""
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    model = FakeModel(answer(*HELLO))
    async with FakeTriton({"vllm": model}) as server:
        assert await command(server, "generate", "-", "--raw") == 0
    assert prompts(model) == ["two\nlines\n"]


async def test_generate_says_when_no_template_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt goes as it is and the user is told; a system message can't go that way."""
    model = FakeModel(answer(*HELLO))
    async with FakeTriton({"vllm": model}) as server:
        assert await command(server, "generate", "Hi") == 0
        assert "no chat template" in capsys.readouterr().err
        assert await command(server, "generate", "Hi", "--system", "x") == 2
    assert prompts(model) == ["Hi"]


async def test_failure_is_one_sentence_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """What was printed stays, the error goes to stderr."""
    async with FakeTriton({"vllm": FakeModel(answer(delta("half")))}) as server:
        assert await command(server, "generate", "Hi", "--raw") == 1
    captured = capsys.readouterr()
    assert captured.out == "half"
    assert captured.err.startswith("tandem: ")
    assert captured.err.count("\n") == 1


async def test_reader_that_goes_away_aborts_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """`| head` ends the command, and the engine behind an ensemble stops too."""

    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    worker = FakeModel(answer(delta(final=True)))
    models = {"disagg": FakeModel(silence_after(delta("a")), steps=("decode",)), "decode": worker}
    monkeypatch.setattr("builtins.print", broken)
    async with FakeTriton(models) as server, asyncio.timeout(10):
        with pytest.raises(BrokenPipeError):
            await asyncio.to_thread(generate.run, parsed(generate, "Hi", "--raw", "--url", server.url))
    assert worker.requests[0].parameters["abort"].string_param == models["disagg"].requests[0].id


async def target_model(*ready: str) -> str:
    """The model that is picked when these are ready."""
    async with FakeTriton({name: FakeModel() for name in ready}) as server, GenerationClient(server.url) as client:
        return (await find_target(client, parsed(chat))).model


async def test_default_model_is_the_preferred_one_that_is_ready() -> None:
    """The ensemble comes before the aggregated worker; prefill and decode alone are never picked."""
    assert await target_model("decode", "disagg", "prefill", "vllm") == "disagg"
    assert await target_model("vllm") == "vllm"
    with pytest.raises(ConfigError, match="decode, prefill with --model"):
        await target_model("decode", "prefill")
    with pytest.raises(UnavailableError, match="tandem status"):
        await target_model()


async def test_template_of_an_ensemble_comes_from_its_workers() -> None:
    """An ensemble has no model of its own; where it names one, that wins."""
    workers = {"prefill": FakeModel(parameters={"model": "Qwen3"}), "decode": FakeModel(parameters={"model": "Qwen3"})}
    for own, template in (({}, ChatMLTemplate()), ({"model": "llama"}, None)):
        ensemble = FakeModel(parameters=own, steps=("prefill", "decode"))
        async with FakeTriton({"disagg": ensemble, **workers}) as server, GenerationClient(server.url) as client:
            assert (await find_target(client, parsed(chat))).template == template


async def test_chat_remembers_forgets_and_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a pipe each line is a turn: the second sees the first, /reset forgets both, nothing follows /exit."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n/exit\nfour\n"))
    model = FakeModel(answer(*HELLO))
    async with FakeTriton({"vllm": model}) as server:
        assert await command(server, "chat", "--chatml", "--system", "S") == 0
    system, one, reply = Message("system", "S"), Message("user", "one"), Message("assistant", "Hello")
    conversations = [[system, one], [system, one, reply, Message("user", "two")], [system, Message("user", "three")]]
    assert prompts(model) == [ChatMLTemplate().render(turns) for turns in conversations]
    assert capsys.readouterr().out == "Hello\n" * 3


async def test_chat_needs_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    """Turns can't be told apart without one."""
    async with FakeTriton({"vllm": FakeModel()}) as server:
        assert await command(server, "chat") == 2
    assert "--chatml" in capsys.readouterr().err


async def test_failed_turn_leaves_the_history_alone() -> None:
    """The next turn doesn't see a question without an answer."""
    async with FakeTriton({"vllm": FakeModel(answer(delta("a")))}) as server:
        conversing = Chat(parsed(chat, "--url", server.url), "vllm", ChatMLTemplate())
        with pytest.raises(UnavailableError):
            await conversing.turn("hi")
    assert conversing.history == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EngineError("broken")])
def test_terminal_goes_on_after_a_failed_turn_and_a_script_does_not(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C and errors end a turn at a terminal; a pipeline must see them."""

    async def failing(_: Chat, __: str) -> None:
        raise error

    monkeypatch.setattr(Chat, "turn", failing)
    conversing = Chat(parsed(chat), "vllm", ChatMLTemplate())
    chat._say(conversing, "hi", interactive=True)
    with pytest.raises(type(error)):
        chat._say(conversing, "hi", interactive=False)


def test_tally_adds_up() -> None:
    """Text and output tokens add up, input tokens don't, and an empty final delta is not a first token."""
    times = iter([10.0, 10.25, 11.0])
    tally = Tally(GenerationRequest("vllm", "hi", request_id="r1"), "raw", clock=lambda: next(times))
    for text, count, reason in (("a", 2, "None"), ("b", 1, "length")):
        outputs = {"text_output": (text,), "finish_reason": (reason,), "num_input_tokens": (4,), "num_output_tokens": (count,)}
        tally.add(Delta(outputs, final=False))
    tally.add(Delta({}, final=True))
    assert tally.summary() == {
        "event": "summary", "request_id": "r1", "model": "vllm", "template": "raw", "text": "ab", "finish_reason": "length",
        "num_input_tokens": 4, "num_output_tokens": 3, "ttft_ms": 250.0, "duration_ms": 1000.0,
    }


def test_answer_without_a_token_has_no_ttft() -> None:
    """Nothing is reported as None, not as zero."""
    times = iter([10.0, 11.0])
    tally = Tally(GenerationRequest("vllm", "hi"), "raw", clock=lambda: next(times))
    tally.add(Delta({}, final=True))
    assert tally.summary()["ttft_ms"] is None


def test_system_message_comes_first() -> None:
    """It is not part of the history that /reset forgets."""
    assert conversation("S", [Message("user", "hi")]) == [Message("system", "S"), Message("user", "hi")]
    assert conversation(None, [Message("user", "hi")]) == [Message("user", "hi")]
