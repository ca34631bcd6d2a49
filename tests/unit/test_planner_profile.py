# SPDX-License-Identifier: Apache-2.0
"""Profiles: files as Dynamo writes them, and what lies between their points."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner_rig import Engine
from tandem_planner.interpolation import DecodeSurface, PrefillCurve
from tandem_planner.profile_data import DecodePoints, PrefillPoints, Profile, read_profile, write_profile
from tandem_protocol.errors import ConfigError


def _prefill(isl: list[float], ttft: list[float]) -> PrefillPoints:
    return PrefillPoints(np.array(isl), np.array(ttft), np.array(isl) / np.array(ttft) * 1e3)


def _decode(rows: list[tuple[float, float, float, float]], capacity: float = 1e6) -> DecodePoints:
    return DecodePoints(*(np.array(column, float) for column in zip(*rows, strict=True)), max_kv_tokens=capacity)


def test_a_profile_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Both files, all figures."""
    written = Engine().profile()
    write_profile(written, tmp_path)
    read = read_profile(tmp_path)
    assert read.prefill is not None
    assert read.decode is not None
    assert written.prefill is not None
    assert written.decode is not None
    assert np.array_equal(read.prefill.ttft_ms, written.prefill.ttft_ms)
    assert np.array_equal(read.decode.itl_ms, written.decode.itl_ms)
    assert read.decode.max_kv_tokens == written.decode.max_kv_tokens
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "decode_raw_data.json", "prefill_raw_data.json",
        "selected_decode_interpolation/raw_data.npz", "selected_prefill_interpolation/raw_data.npz",
    ]


def test_dynamos_names_and_units_are_those_of_the_files(tmp_path: Path) -> None:
    """Written by its names, with an int where it has one, and points in any order."""
    (tmp_path / "selected_prefill_interpolation").mkdir()
    np.savez(tmp_path / "selected_prefill_interpolation/raw_data.npz", prefill_isl=np.array([3000, 100]),
             prefill_ttft=np.array([80.0, 10.0]), prefill_thpt_per_gpu=np.array([37_500.0, 10_000.0]))
    (tmp_path / "decode_raw_data.json").write_text(json.dumps({
        "x_kv_usage": [0.1, 0.5], "y_context_length": [3000, 3000], "z_itl": [5.0, 9.0], "z_thpt_per_gpu": [6000, 17_000],
        "max_kv_tokens": [900_000],
    }))
    profile = read_profile(tmp_path)
    assert profile.prefill is not None
    assert profile.decode is not None
    assert profile.prefill.isl.tolist() == [100, 3000]
    assert PrefillCurve(profile.prefill).ttft_s(3000) == pytest.approx(0.08)
    assert DecodeSurface(profile.decode).itl_s(0.5, 3000) == pytest.approx(0.009)
    assert profile.decode.max_kv_tokens == 900_000


@pytest.mark.parametrize(("text", "sentence"), [
    ("{", "can't be read as JSON"),
    ("[1]", "not a JSON object"),
    ('{"prefill_isl": [1]}', "prefill_ttft is missing"),
    ('{"prefill_isl": [1], "prefill_ttft": ["x"], "prefill_thpt_per_gpu": [1]}', "not a list of numbers"),
    ('{"prefill_isl": [], "prefill_ttft": [], "prefill_thpt_per_gpu": []}', "has 0 points"),
    ('{"prefill_isl": [1, 2], "prefill_ttft": [1], "prefill_thpt_per_gpu": [1]}', "each needs the same number"),
    ('{"prefill_isl": [1], "prefill_ttft": [NaN], "prefill_thpt_per_gpu": [1]}', "must be finite and above 0"),
    ('{"prefill_isl": [1], "prefill_ttft": [-3], "prefill_thpt_per_gpu": [1]}', "holds -3"),
])
def test_a_malformed_file_is_refused_with_its_path_and_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    """Never a figure that nobody measured."""
    (tmp_path / "prefill_raw_data.json").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_profile(tmp_path)
    assert "prefill_raw_data.json" in str(caught.value)


def test_a_torn_npz_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    """The one can't be read, the other holds nothing."""
    with pytest.raises(ConfigError, match="holds no profile"):
        read_profile(tmp_path)
    (tmp_path / "selected_decode_interpolation").mkdir()
    (tmp_path / "selected_decode_interpolation/raw_data.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ConfigError, match="can't be read as npz"):
        read_profile(tmp_path)


def test_a_share_in_percent_is_refused() -> None:
    """KV use goes from 0 to 1."""
    with pytest.raises(ConfigError, match="share, from 0 to 1"):
        _decode([(50.0, 3000, 5, 1000)])


def test_curves_go_through_their_points() -> None:
    """At what was measured, the measured figure."""
    curve = PrefillCurve(_prefill([100, 1000, 3000, 8000], [8, 30, 90, 300]))
    assert [curve.ttft_s(isl) * 1e3 for isl in (100, 1000, 3000, 8000)] == pytest.approx([8, 30, 90, 300])
    assert curve.ttft_s(50) == pytest.approx(0.008)
    assert curve.ttft_s(50_000) == pytest.approx(0.3)
    assert curve.longest_within(0.09) == pytest.approx(3000, rel=0.01)
    assert curve.longest_within(0.001) is None


@given(st.lists(st.tuples(st.floats(1, 1e5), st.floats(0.1, 1e5)), min_size=1, max_size=12, unique_by=lambda one: one[0]),
       st.floats(0, 2e5))
def test_prefill_never_overshoots(points: list[tuple[float, float]], isl: float) -> None:
    """Between the least and the greatest measured, whatever the points, and no shorter for a longer prompt."""
    isls, ttfts = zip(*sorted(points), strict=True)
    curve = PrefillCurve(_prefill(list(isls), list(ttfts)))
    assert min(ttfts) * (1 - 1e-9) <= curve.ttft_s(isl) * 1e3 <= max(ttfts) * (1 + 1e-9)
    assert curve.ttft_s(isl) <= curve.ttft_s(isl * 1.5) + 1e-12
    assert curve.throughput_per_gpu(isl) > 0


def test_decode_figures_between_points_are_near_the_engines() -> None:
    """Five contexts by six loads; the engine's own formula off the grid."""
    engine, profile = Engine(), Engine().profile()
    assert profile.decode is not None
    surface = DecodeSurface(profile.decode)
    for use, context in ((0.13, 3000.0), (0.4, 2200.0), (0.77, 4500.0), (0.5, 9000.0)):
        assert surface.itl_s(use, context) * 1e3 == pytest.approx(engine.itl_ms(use, context), rel=0.12)


@pytest.mark.parametrize("points", [1, 2, 4])
def test_few_points_are_enough(points: int) -> None:
    """From points that make no rows a model with physical terms is fitted: it is exact where they are."""
    engine = Engine()
    grid = [(0.1, 2000.0), (0.5, 2500.0), (0.3, 4000.0), (0.8, 6000.0)][:points]
    rows = [(use, context, engine.itl_ms(use, context), use * 1e6 / context / engine.itl_ms(use, context) * 1e3) for use, context in grid]
    surface = DecodeSurface(_decode(rows))
    for use, context, itl, rate in rows:
        assert surface.itl_s(use, context) * 1e3 == pytest.approx(itl, rel=0.1)
        assert surface.throughput_per_gpu(use, context) == pytest.approx(rate, rel=0.15)
    best = surface.best_throughput_per_gpu(1.0, 3000)
    assert best.met
    assert best.throughput_per_gpu > 0


def test_the_best_throughput_is_at_the_highest_load_that_keeps_the_itl() -> None:
    """Within the target, and below the KV use that is allowed; else the lightest load, marked as missed."""
    engine, profile = Engine(), Engine().profile(loads=24)
    assert profile.decode is not None
    surface = DecodeSurface(profile.decode)
    best = surface.best_throughput_per_gpu(0.010, 3000)
    assert best.met
    assert engine.itl_ms(best.kv_use, 3000) == pytest.approx(10.0, rel=0.03)
    assert best.throughput_per_gpu == pytest.approx(best.kv_use * 1e6 / 3000 / 0.010, rel=0.05)
    assert surface.best_throughput_per_gpu(10.0, 3000, max_kv_use=0.5).kv_use <= 0.5
    missed = surface.best_throughput_per_gpu(0.001, 3000)
    assert not missed.met
    assert missed.kv_use == pytest.approx(0.02)
    assert surface.least_itl_s(3000) == pytest.approx(missed.itl_s)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(10, 1e5), st.floats(0.1, 1e4), st.floats(0.1, 1e5)), min_size=1, max_size=20),
       st.floats(0, 1.5), st.floats(1, 2e5), st.floats(1e-4, 100))
def test_any_decode_profile_gives_finite_positive_figures(rows: list[tuple[float, float, float, float]], use: float, context: float,
                                                          itl: float) -> None:
    """Scattered, repeated, contradictory points: never zero, negative or NaN where a plan divides."""
    surface = DecodeSurface(_decode(rows))
    best = surface.best_throughput_per_gpu(itl, context)
    for figure in (surface.itl_s(use, context), best.throughput_per_gpu, best.itl_s):
        assert np.isfinite(figure)
        assert figure > 0
    assert surface.throughput_per_gpu(use, context) >= 0
    assert surface.itl_s(use, context) <= surface.itl_s(min(1.5, use + 0.2), context) + 1e-9


def test_a_profile_may_have_one_part_only(tmp_path: Path) -> None:
    """As for a planner of one pool."""
    write_profile(Profile(prefill=Engine().profile().prefill), tmp_path)
    assert read_profile(tmp_path).decode is None
