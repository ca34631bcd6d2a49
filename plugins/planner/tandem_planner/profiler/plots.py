# SPDX-License-Identifier: Apache-2.0
"""A profile as pictures: SVG files, which need no library, and the same as PNG where matplotlib is installed."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem_planner.charts import Line, chart
from tandem_planner.profile_data import DecodePoints, PrefillPoints, Profile

_INCHES, _DPI = (7.2, 3.2), 120


@dataclass(frozen=True)
class Picture:
    """One diagram."""

    name: str
    """Of its files, without the suffix."""
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


def write_plots(profile: Profile, folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Writes what there is; returns the files. Without matplotlib there are no PNG files, which is said."""
    pictures = pictures_of(profile)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{picture.name}.svg" for picture in pictures]
    for file, picture in zip(files, pictures, strict=True):
        file.write_text(chart(picture.title, picture.x_label, picture.y_label, picture.lines))
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        say(f"no PNG plots, since matplotlib is missing here: `pip install matplotlib`, or see the SVG files in {folder}")
        return files
    return files + [_write_png(figures.Figure, picture, folder / f"{picture.name}.png") for picture in pictures]


def pictures_of(profile: Profile) -> list[Picture]:
    """Two per role."""
    prefill = [] if profile.prefill is None else _prefill_pictures(profile.prefill)
    return prefill + ([] if profile.decode is None else _decode_pictures(profile.decode))


def _write_png(figure_class: Callable[..., Any], picture: Picture, file: Path) -> Path:
    """Without pyplot, which would look for a display and keep every figure."""
    figure = figure_class(figsize=_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot(title=picture.title, xlabel=picture.x_label, ylabel=picture.y_label)
    for line in picture.lines:
        axes.plot(line.xs, line.ys, marker=".", label=line.label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
    return file


def _prefill_pictures(points: PrefillPoints) -> list[Picture]:
    isl = points.isl.tolist()
    return [
        Picture("prefill_ttft", "TTFT of one prompt", "prompt tokens", "ms", (Line("TTFT", isl, points.ttft_ms.tolist()),)),
        Picture("prefill_throughput", "Prefill per GPU", "prompt tokens", "tokens/s",
                (Line("throughput", isl, points.thpt_per_gpu.tolist()),)),
    ]


def _decode_pictures(points: DecodePoints) -> list[Picture]:
    """A line per context, six at most."""
    contexts = np.unique(points.context_length)
    shown = contexts[np.unique(np.linspace(0, contexts.size - 1, min(6, contexts.size)).round().astype(int))]
    return [
        Picture("decode_itl", "ITL by context", "KV use", "ms", tuple(_row(points, context, points.itl_ms) for context in shown)),
        Picture("decode_throughput", "Decode per GPU by context", "KV use", "tokens/s",
                tuple(_row(points, context, points.thpt_per_gpu) for context in shown)),
    ]


def _row(points: DecodePoints, context: float, values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Line:
    at = np.flatnonzero(points.context_length == context)
    order = at[np.argsort(points.kv_usage[at], kind="stable")]
    return Line(f"{context:g} tokens", points.kv_usage[order].tolist(), values[order].tolist())
