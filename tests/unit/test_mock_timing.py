# SPDX-License-Identifier: Apache-2.0
"""Step times follow the batch, and a profile gives its own coefficients back."""

from pathlib import Path

import msgspec
import pytest

from tandem_protocol.errors import ConfigError
from tandem_worker.mock.timing import BatchShape, ProfilePoint, StepTiming, fit, load_profile

SHAPES = [BatchShape(1000, 5e5), BatchShape(8000, 3.2e7), BatchShape(0, 0, 1, 1000), BatchShape(0, 0, 64, 64_000),
          BatchShape(0, 0, 64, 640_000), BatchShape(2000, 4e7, 32, 32_000)]


def points(timing: StepTiming) -> list[ProfilePoint]:
    return [ProfilePoint(timing.seconds(shape), shape.prefill_tokens, shape.attention_pairs, shape.decode_sequences, shape.context_tokens)
            for shape in SHAPES]


def test_longer_prompts_more_sequences_and_longer_contexts_take_longer() -> None:
    timing = StepTiming()
    times = [timing.seconds(shape) for shape in (BatchShape(0, 0, 1, 100), BatchShape(0, 0, 100, 10_000), BatchShape(0, 0, 100, 900_000))]
    assert times == sorted(times)
    assert timing.seconds(BatchShape(8000, 6.4e7)) > timing.seconds(BatchShape(8000, 3.2e7))


def test_speedup_divides_every_time() -> None:
    assert StepTiming(speedup=10).seconds(SHAPES[5]) == pytest.approx(StepTiming().seconds(SHAPES[5]) / 10)


def test_a_profile_of_exact_steps_is_recovered() -> None:
    truth = StepTiming(4e-3, 30e-6, 2e-9, 50e-6, 60e-9)
    found = fit(points(truth))
    for shape in [*SHAPES, BatchShape(500, 1e6, 10, 123_456)]:
        assert found.seconds(shape) == pytest.approx(truth.seconds(shape), rel=1e-6)


def test_noise_never_makes_a_coefficient_negative() -> None:
    noisy = [ProfilePoint(point.seconds * (0.5 if index % 2 else 2.0), point.prefill_tokens, point.attention_pairs, point.decode_sequences,
                          point.context_tokens) for index, point in enumerate(points(StepTiming()))]
    assert min(vars(fit(noisy)).values()) >= 0


def test_a_profile_is_read_from_json_and_a_bad_one_says_why(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(msgspec.json.encode(points(StepTiming())))
    assert load_profile(file, speedup=2).seconds(SHAPES[0]) == pytest.approx(StepTiming(speedup=2).seconds(SHAPES[0]))
    file.write_text('[{"seconds": 1, "tokens": 2}]')
    with pytest.raises(ConfigError, match="tokens"):
        load_profile(file)
    with pytest.raises(ConfigError, match="5 steps"):
        fit(points(StepTiming())[:4])
    with pytest.raises(ConfigError, match="speedup"):
        StepTiming(speedup=0)
