# SPDX-License-Identifier: Apache-2.0
"""What the launcher reads off a starting server's log."""

import time

import pytest

from tandem_cli.serve.readiness import Progress, load_failure, tail

HEAD = "E1121 04:24:03.1 1 model_lifecycle.cc:654] "
ENDING = r"\n\nAt:\n  /x/triton.py(86): initialize\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (HEAD + "\"failed to load 'vllm' version 1: Internal: TritonModelException: unknown engine argument 'foo' in model.json: "
         f"see vLLM's engine arguments{ENDING}\"",
         "model vllm did not start: unknown engine argument 'foo' in model.json: see vLLM's engine arguments"),
        (HEAD + "\"failed to load 'decode_1' version 1: Internal: TritonModelException: write \\\"a\\\" instead" + ENDING + '"',
         'model decode_1 did not start: write "a" instead'),
        (HEAD + "\"failed to load 'vllm' version 1: Internal: ConfigError: unknown parameter 'rolle' in config.pbtxt: "
         f"known are a, b{ENDING}\"",
         "model vllm did not start: unknown parameter 'rolle' in config.pbtxt: known are a, b"),
        (HEAD + "\"failed to load 'prefill' version 1: Invalid argument: unable to find backend\"",
         "model prefill did not start: unable to find backend"),
        (HEAD + "\"failed to load 'vllm' version 12: Internal: RuntimeError: CUDA out of memory" + ENDING + '"',
         "model vllm did not start: RuntimeError: CUDA out of memory"),
        (HEAD + "failed to load 'vllm' version 1: Internal: Stub process 'vllm_0_0' is not healthy.\nI1121 next line",
         "model vllm did not start: Stub process 'vllm_0_0' is not healthy."),
    ],
    ids=["tandem", "quotes", "auto-complete", "two-word-status", "traceback", "unescaped"],
)
def test_the_reason_is_the_first_line_of_the_models_own_message(line: str, reason: str) -> None:
    """Without Triton's prefixes and without the Python frames."""
    assert load_failure(f"I1121 04:24:00.0 1 server.cc:1] \"starting\"\n{line}\n") == reason


@pytest.mark.parametrize(
    "log", ["", 'I1121 04:24:03.1 1 model_lifecycle.cc:849] "successfully loaded \'vllm\'"\n', "failed to load the dice\n"]
)
def test_a_log_without_a_failure_has_no_reason(log: str) -> None:
    """Then waiting goes on."""
    assert load_failure(log) is None


def test_the_first_failure_is_the_cause() -> None:
    """What fails later fails because of it."""
    lines = [f"failed to load '{name}' version 1: Internal: reason {name}" for name in ("prefill", "disagg")]
    assert load_failure("\n".join(lines)) == "model prefill did not start: reason prefill"


def test_tail_is_the_end_of_the_log() -> None:
    """Enough to see the cause, not more."""
    lines = [str(i) for i in range(100)]
    assert tail("\n".join(lines)).splitlines() == lines[-15:]


def test_progress_names_what_is_still_starting(capsys: pytest.CaptureFixture[str]) -> None:
    """One line whenever another worker is ready."""
    progress = Progress(("prefill", "decode"), time.monotonic())
    progress.show("... worker.ready model=prefill role=prefill seconds=20.0\n")
    assert "1/2 engines ready; starting decode" in capsys.readouterr().err


def test_progress_is_silent_without_news(capsys: pytest.CaptureFixture[str]) -> None:
    """For ten seconds at least."""
    progress = Progress(("prefill",), time.monotonic())
    progress.show("")
    assert capsys.readouterr().err == ""


def test_the_time_since_the_last_engine_was_ready_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stays unready after that has given a worker up."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(("prefill",), 100.0)
    progress.show("")
    assert progress.all_ready_for() == 0
    progress.show("worker.ready model=prefill\n")
    clock[0] = 107.0
    progress.show("worker.ready model=prefill\n")
    assert progress.all_ready_for() == 7


def test_a_router_alone_has_the_whole_time_to_start() -> None:
    """Without engines there is no last one that got ready, so the server's grace after it never begins."""
    progress = Progress((), time.monotonic() - 1000)
    progress.show("")
    assert progress.all_ready_for() == 0


def test_a_consolidator_that_cannot_start_ends_the_wait() -> None:
    """Its own sentence is the reason; what its supervisor says of later ends is not."""
    said = "the consolidated KV events can't be published at tcp://0.0.0.0:57001 (Address already in use): set TANDEM_CONSOLIDATOR_PORT"
    assert load_failure(f"I1121 starting\ntandem consolidator: {said}\n") == f"a consolidator of KV events did not start: {said}"
    assert load_failure("2026 ERROR __main__ consolidator.ended code=-9 early_ends=1: starting it again in 0.5 s\n") is None
