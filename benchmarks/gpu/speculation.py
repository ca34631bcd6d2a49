# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding against the same engine without it: the same greedy text, how many guesses are accepted, and how fast it is.

Cases: `plain`; `ngram`, guesses out of the prompt and the answer so far; `draft_model`, whose draft is the target's own checkpoint, so
that nearly every guess must be accepted; `disagg`, prefill and decode with that draft, whose own KV blocks must travel, too; `eagle3` and
`disagg_eagle3`, with a head of random weights, whose guesses are refused. On a GPU all servers run at once, since their starts take
longest, and are asked one after the other; on CPUs one server runs at a time. float32, in which equal tokens mean equal mathematics.
Prints one JSON line; exits with 1 if a check failed.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import hardware
from benchmarks.errors import BenchmarkError
from benchmarks.gpu.greedy_texts import Reference, differences
from benchmarks.gpu.sleep import OK, get, post
from benchmarks.gpu.speculation_cases import Case, Guesses, Outcome, cases, prompts
from benchmarks.gpu.speculation_head import make_eagle3_head
from benchmarks.targets import HOST, command_flags, tandem_command

from tandem_cli.serve.embedded_model import embedded_model
from tandem_cli.serve.layout import run_folder
from tandem_cli.serve.run_state import RunState, read_state

STOP_TIMEOUT_S = 60.0
GPU_KV_BYTES = 4 << 30
GPU_SHARE = 0.1
"""Of the GPU's memory that must be free at an engine's start; eight engines start at once."""
PORTS_PER_SERVER = 100
LIKELY = 5
"""Log-probabilities asked per token of the reference."""


class Asked:
    """One running server, asked one prompt after the other."""

    def __init__(self, case: Case, state: RunState, tokens: int) -> None:
        self._case = case
        self._url = f"http://{HOST}:{state.http_port}/v2/models/{case.model}/generate"
        self._metrics = f"{state.admin_urls[case.decoder]}/metrics"
        self._tokens = tokens

    def reference(self, prompt: str) -> Reference:
        """The answer with its likely tokens. Raises BenchmarkError with the server's sentence."""
        answer = self._answer(prompt, likely=True)
        steps = json.loads(str(answer["logprobs"]))
        likely = tuple({int(token): float(step[token]["logprob"]) for token in step} for step in steps)
        return Reference(tuple(answer["output_ids"]), likely)

    def outcome(self, texts: Sequence[str], references: Sequence[Reference]) -> Outcome:
        """All prompts, timed after one that is not. Raises BenchmarkError."""
        self._answer(texts[0][::-1])
        before, started = self._guesses(), time.monotonic()
        answers = [self._answer(text)["output_ids"] for text in texts]
        wall_s, after = time.monotonic() - started, self._guesses()
        guesses = after.since(before).without(len(answers), self._case.padding) if self._case.speculative else None
        return Outcome(self._case.name, sum(map(len, answers)), wall_s, guesses, self._case.least_acceptance,
                       tuple(differences(references, answers)))

    def _answer(self, prompt: str, *, likely: bool = False) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_tokens": self._tokens, "ignore_eos": True, **({"logprobs": LIKELY} if likely else {})}
        body = {"text_input": prompt, "stream": False, "exclude_input_in_output": True, "return_output_ids": True,
                "return_logprobs": likely, "sampling_parameters": json.dumps(sampling)}
        code, answer = post(self._url, body)
        if code != OK:
            raise BenchmarkError(f"{self._case.name} answered {code}: {answer.get('error', answer)}")
        return answer

    def _guesses(self) -> Guesses:
        lines = get(self._metrics).splitlines()

        def total(name: str) -> float:
            return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:spec_decode_num_{name}_total{{"))

        return Guesses(total("drafts"), total("draft_tokens"), total("accepted_tokens"))


@contextmanager
def served(case: Case, index: int, args: argparse.Namespace, *, gpu: bool) -> Iterator[RunState]:
    """The case's server, stopped at the end. Raises BenchmarkError."""
    port, log = args.port + index * PORTS_PER_SERVER, args.log_dir / f"{case.name}-launcher.log"
    own = {"kv_cache_memory_bytes": GPU_KV_BYTES, "gpu_memory_utilization": GPU_SHARE} if gpu else {}
    offsets = {"http-port": 0, "grpc-port": 1, "metrics-port": 2, "admin-port": 10, "kv-event-port": 20, "side-channel-port": 30}
    engine = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 16, **own}
    if case.speculative:
        engine["speculative_config"] = case.speculative
    flags = [*(f"--{name}={port + offset}" for name, offset in offsets.items()), *command_flags(engine)]
    try:
        serve = ["serve", "--detach", "--routers=0", f"--mode={case.mode}", f"--model={args.model}"]
        tandem_command([*serve, f"--start-timeout={args.start_timeout}", *flags], log, args.start_timeout + 30)
        state = read_state(run_folder(port))
        assert state is not None, "the launcher said that it runs"
        yield state
    finally:
        _stop(case, port, log, args.log_dir)


def _stop(case: Case, port: int, log: Path, folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.copyfile(run_folder(port).log, folder / f"{case.name}-server.log")
    tandem_command(["stop", f"--http-port={port}", "--drain-timeout-s=0"], log, STOP_TIMEOUT_S, check=False)


class Comparison:
    """What the cases gave so far; the plain one comes first and is what the others are compared with."""

    def __init__(self, texts: Sequence[str], tokens: int) -> None:
        self._texts, self._tokens = texts, tokens
        self._references: list[Reference] = []
        self.outcomes: list[Outcome] = []
        self.errors: dict[str, str] = {}

    def take(self, case: Case, state: RunState) -> None:
        """Asks one server; what fails is noted, and the others go on."""
        asked = Asked(case, state, self._tokens)
        try:
            if not self._references:
                self._references = [asked.reference(text) for text in self._texts]
            self.outcomes.append(asked.outcome(self._texts, self._references))
            print(f"{case.name}: {self.outcomes[-1]}", file=sys.stderr, flush=True)
        except (BenchmarkError, OSError) as exc:
            self.fail(case, exc)

    def fail(self, case: Case, exc: Exception) -> None:
        """A case that gave no figures."""
        self.errors[case.name] = str(exc)
        print(f"{case.name} failed: {exc}", file=sys.stderr, flush=True)

    def report(self) -> dict[str, Any]:
        """For the JSON line."""
        passed = bool(self.outcomes) and not self.errors and all(outcome.passed for outcome in self.outcomes)
        return {"passed": passed, "cases": [outcome.report(self.outcomes[0]) for outcome in self.outcomes], "errors": self.errors}


Serving = Callable[[Case, int], Any]
"""A context manager of a running server, by its case and number."""


def one_by_one(chosen: Sequence[Case], serving: Serving, comparison: Comparison) -> None:
    """One server at a time, for machines that can't hold all."""
    for index, case in enumerate(chosen):
        try:
            with serving(case, index) as state:
                comparison.take(case, state)
        except (BenchmarkError, OSError) as exc:
            comparison.fail(case, exc)
        if not comparison.outcomes:
            return


def together(chosen: Sequence[Case], serving: Serving, comparison: Comparison) -> None:
    """All servers started at once, asked in turn when none starts any more, so that no start disturbs a figure, and stopped at once."""
    contexts = [serving(case, index) for index, case in enumerate(chosen)]
    with ThreadPoolExecutor(len(chosen)) as pool:
        starts = [pool.submit(context.__enter__) for context in contexts]
        try:
            wait(starts)  # each has its own deadline
            for case, start in zip(chosen, starts, strict=True):
                try:
                    comparison.take(case, start.result())
                except (BenchmarkError, OSError) as exc:
                    comparison.fail(case, exc)
        finally:
            begun = [context for context, start in zip(contexts, starts, strict=True) if start.exception() is None]
            list(pool.map(lambda context: context.__exit__(None, None, None), begun))


def arguments(head: Path) -> argparse.Namespace:
    """The command line; `head` is where an Eagle3 head is made if a case needs one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of the model (default: the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--cases", default="plain,ngram,draft_model,disagg,eagle3,disagg_eagle3",
                        help="comma-separated, plain first (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=96, help="per prompt (default: %(default)s)")
    parser.add_argument("--speculative-tokens", type=int, default=4, help="guessed at once (default: %(default)s)")
    parser.add_argument("--log-dir", type=Path, default=Path("/tmp/tandem-speculation"), help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=18500, help="first port (default: %(default)s)")
    parser.add_argument("--start-timeout", type=int, default=205,
                        help="seconds; eight engines that start at once on 16 cores compile slowly (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="accepted: the report is one JSON line anyway")
    args = parser.parse_args()
    args.model = args.model or str(embedded_model())
    names = args.cases.split(",")
    known = cases(args.model, str(head), args.speculative_tokens)
    if names[0] != "plain" or not set(names) <= set(known):
        parser.error(f"--cases {args.cases}: name plain first, then any of {', '.join(name for name in known if name != 'plain')}")
    args.cases = [known[name] for name in names]
    if any((case.speculative or {}).get("model") == str(head) for case in args.cases):
        make_eagle3_head(Path(args.model), head)
    return args


def main() -> int:
    """The command."""
    with tempfile.TemporaryDirectory() as scratch:
        return compare(arguments(Path(scratch) / "eagle3-head"))


def compare(args: argparse.Namespace) -> int:
    """Runs the cases and prints the report; the exit code."""
    args.log_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # kernels written in Triton would multiply float32 as TF32, which has 10 bits
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a time limit must not leave servers behind
    machine = hardware.detect()
    gpu = bool(machine.gpus)
    report: dict[str, Any] = {"benchmark": "speculation", "hardware": machine.describe(), "versions": hardware.versions(),
                              "model": args.model, "dtype": "float32", "speculative_tokens": args.speculative_tokens,
                              "prompts": args.prompts, "tokens_per_prompt": args.output_tokens}
    started = time.monotonic()
    comparison = Comparison(prompts(args.prompts), args.output_tokens)
    (together if gpu else one_by_one)(args.cases, partial(served, args=args, gpu=gpu), comparison)
    report.update(comparison.report(), total_s=round(time.monotonic() - started, 1))
    print(json.dumps(report), flush=True)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
