# SPDX-License-Identifier: Apache-2.0
"""A profile as pictures: SVG files that need no library. Pure but for the writing."""

from pathlib import Path

import numpy as np

from tandem_planner.charts import Line, chart
from tandem_planner.profile_data import DecodePoints, PrefillPoints, Profile


def write_plots(profile: Profile, folder: Path) -> list[Path]:
    """Writes what there is; returns the files."""
    pictures: dict[str, str] = {}
    if profile.prefill is not None:
        pictures |= prefill_charts(profile.prefill)
    if profile.decode is not None:
        pictures |= decode_charts(profile.decode)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pictures.items():
        (folder / name).write_text(text)
    return [folder / name for name in pictures]


def prefill_charts(points: PrefillPoints) -> dict[str, str]:
    """File name -> SVG."""
    isl = points.isl.tolist()
    return {
        "prefill_ttft.svg": chart("TTFT of one prompt", "prompt tokens", "ms", [Line("TTFT", isl, points.ttft_ms.tolist())]),
        "prefill_throughput.svg": chart("Prefill per GPU", "prompt tokens", "tokens/s",
                                        [Line("throughput", isl, points.thpt_per_gpu.tolist())]),
    }


def decode_charts(points: DecodePoints) -> dict[str, str]:
    """File name -> SVG; a line per context, six at most."""
    contexts = np.unique(points.context_length)
    shown = contexts[np.unique(np.linspace(0, contexts.size - 1, min(6, contexts.size)).round().astype(int))]
    return {
        "decode_itl.svg": chart("ITL by context", "KV use", "ms", [_row(points, context, points.itl_ms) for context in shown]),
        "decode_throughput.svg": chart("Decode per GPU by context", "KV use", "tokens/s",
                                       [_row(points, context, points.thpt_per_gpu) for context in shown]),
    }


def _row(points: DecodePoints, context: float, values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Line:
    at = np.flatnonzero(points.context_length == context)
    order = at[np.argsort(points.kv_usage[at], kind="stable")]
    return Line(f"{context:g} tokens", points.kv_usage[order].tolist(), values[order].tolist())
