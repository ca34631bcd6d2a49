# SPDX-License-Identifier: Apache-2.0
"""The benchmark of images: what it sends, what it counts, and when a split is none."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks import multimodal as bench
from benchmarks.errors import BenchmarkError
from benchmarks.multimodal_load import Batch, Beside, Front, Load, Rounds, Shape, make_image

SHAPE = Shape(images=3, pixels=32, tokens=4, rounds=2, streams=2, stream_tokens=40, placeholder="<image>")
FRONT = Front(("encode_agg",), ("vllm",))
BATCH = Batch(2.0, (0.5, 0.25, 1.0))


@dataclass
class StubClient:
    """A server that answers at once, a response per token."""

    text_responses: int = 40
    complaint: str = ""
    asked: list[tuple[str, str, bytes]] = field(default_factory=list)

    async def stream_infer(self, requests: AsyncIterator[dict[str, Any]]) -> AsyncIterator[tuple[Any, str | None]]:
        """As tritonclient does it."""
        request = await anext(requests)
        inputs = {tensor.name(): tensor._get_content() for tensor in request["inputs"]}
        self.asked.append((request["model_name"], inputs["text_input"].decode(errors="replace"), inputs.get("image", b"")))
        if self.complaint:
            yield None, self.complaint
        count = SHAPE.tokens if "image" in inputs else self.text_responses
        for number in range(count):
            await asyncio.sleep(0)
            yield response(final=number == count - 1), None


def response(*, final: bool) -> Any:
    """With the one parameter that is looked at."""
    parameters = {"triton_final_response": SimpleNamespace(bool_param=final)}
    return SimpleNamespace(get_response=lambda: SimpleNamespace(parameters=parameters))


async def test_rounds_share_what_they_say_they_share() -> None:
    """Images of new rounds are all different, the next round's are the last one's in another prompt, and text runs beside the last."""
    client = StubClient()
    rounds = await Load(client, FRONT, SHAPE).rounds()
    sent = [(prompt, image) for _, prompt, image in client.asked if image]
    first, second, again, beside = (sent[at:at + SHAPE.images] for at in range(1, len(sent), SHAPE.images))
    assert len({image for _, image in [sent[0], *first, *second, *beside]}) == 1 + 3 * SHAPE.images
    assert [image for _, image in again] == [image for _, image in second]
    assert not {prompt[:40] for prompt, _ in second} & {prompt[:40] for prompt, _ in again}, "no KV block is the same"
    assert [model for model, _, image in client.asked if not image] == ["vllm"] * SHAPE.streams
    assert [len(batch.first_tokens_s) for batch in (*rounds.new, rounds.again, rounds.beside.batch)] == [SHAPE.images] * 4
    assert rounds.beside.before_s
    assert rounds.beside.while_s


async def test_engines_side_by_side_are_asked_in_turn() -> None:
    """Each gets every second image, and is warmed up."""
    client = StubClient()
    await Load(client, bench.TWO.front, replace(SHAPE, images=4)).rounds()
    assert [model for model, _, image in client.asked if image][2:6] == ["vllm", "vllm_1"] * 2


async def test_a_server_that_complains_or_a_stream_that_is_too_short_ends_it() -> None:
    """With a sentence."""
    with pytest.raises(BenchmarkError, match="no such model"):
        await Load(StubClient(complaint="no such model"), FRONT, SHAPE).rounds()
    with pytest.raises(ExceptionGroup) as failed:
        await Load(StubClient(text_responses=3), FRONT, SHAPE).rounds()
    assert failed.group_contains(BenchmarkError, match="give it more tokens")


def test_an_image_is_a_file_of_its_own() -> None:
    """The same for the same seed."""
    assert make_image(1, 64) == make_image(1, 64) != make_image(2, 64)


def way(seconds: float, pauses: tuple[float, ...]) -> dict[str, Any]:
    """One way's part of a report, with batches that took so long."""
    batch = replace(BATCH, seconds=seconds)
    return bench.report_of(Rounds((batch, replace(BATCH, seconds=100.0), batch), batch, Beside(batch, (0.01,), pauses)))


def test_ratios_are_of_medians_and_none_where_a_side_is_missing() -> None:
    """Twice as fast is 2 of images per second, half the pause 0.5."""
    report = {"failures": {"two_engines": "it ended while starting"}, "aggregated": way(4.0, (0.2,)), "encode_split": way(2.0, (0.1,))}
    found = bench.ratios(report)
    assert (found["split_vs_agg_images_per_s"], found["split_vs_agg_text_pause_p99"]) == (2.0, 0.5)
    assert found["split_vs_two_images_per_s"] is None
    assert bench.ratios({**report, "aggregated": way(4.0, ())})["split_vs_agg_text_pause_max"] is None, "no pause was seen"
    assert not [name for name in bench.ratios({"failures": {"encode_split": "x"}, "aggregated": way(1.0, (0.1,))}) if "two" in name]


def test_a_split_whose_embeddings_nobody_took_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or were too few, after the time in which engines tell of them."""
    ticks = iter(range(1000))
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: float(next(ticks)), sleep=lambda _: None))
    counts = {"loaded": 9, "missed": 0, "offered": 9, "lost": 0}
    monkeypatch.setattr(bench, "_counts", lambda _: counts)
    assert bench._embeddings(1, SHAPE) == counts
    for worse in ({"loaded": 8}, {"missed": 1}):
        monkeypatch.setattr(bench, "_counts", lambda _, worse=worse: counts | worse)
        with pytest.raises(BenchmarkError, match="no split"):
            bench._embeddings(1, SHAPE)


def test_counters_are_summed_over_engines_and_placements_told() -> None:
    """A counter that nobody touched is 0."""
    name = "tandem_embeddings_loaded"
    text = f'{name}_total{{engine="0"}} 3.0\n{name}_total{{engine="1"}} 2.0\n{name}_created{{engine="0"}} 9.0\n'
    assert (bench.counted(text, f"{name}_total"), bench.counted(text, "tandem_embeddings_missed_total")) == (5, 0)
    assert bench.placement(bench.AGGREGATED, 2) == "1 GPU"
    assert bench.placement(bench.SPLIT, 1) == "2 engines share 1 GPU"
    assert bench.placement(bench.TWO, 2) == "2 engines, a GPU each"


def test_what_was_measured_is_reported_when_it_is_cut_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                            tmp_path: Path) -> None:
    """By SIGTERM in the second of three ways; the third isn't begun, and the signal means afterwards what it meant before."""
    begun = []

    def run(one: bench.Way, *_: object) -> dict[str, Any]:
        begun.append(one.name)
        if one is bench.SPLIT:
            os.kill(os.getpid(), signal.SIGTERM)
        return way(2.0, (0.1,))

    monkeypatch.setattr(bench, "_run", run)
    before = signal.getsignal(signal.SIGTERM)
    assert bench.main(["--json", "--model", "none", "--two-engines", "--log-dir", str(tmp_path)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert begun == ["aggregated", "encode_split"]
    assert report["aggregated"]["images_again"]["images"] == 3
    assert report["failures"] == {"encode_split": "cut short by SIGTERM"}
    assert report["split_vs_agg_images_per_s"] is None
    assert signal.getsignal(signal.SIGTERM) is before
