# SPDX-License-Identifier: Apache-2.0
"""Runs as one page: a table, and per run the requests, the workers and the latencies over time. Self-contained HTML. Pure."""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tandem_planner.charts import Line, chart
from tandem_planner.simulate.results import Interval, Summary, Targets
from tandem_planner.simulate.run import Run

_STYLE = ("body{font:14px sans-serif;margin:2em;max-width:90em}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:4px 8px;"
          "text-align:right}td:first-child,th:first-child{text-align:left}.note{background:#fff3cd;padding:8px}svg{margin:6px}")
_DEFINITIONS = ("An interval is within the SLA when both 95th percentiles are, over the requests that arrived in it. "
                "GPU time counts from the decision to start a worker until it is gone.")
_COLUMNS = ("planner", "requests", "good", "goodput / GPU hour", "intervals within SLA", "GPU hours", "mean GPUs", "TTFT p50/p95/p99 ms",
            "ITL p50/p95/p99 ms", "oscillations", "scale-up s")
_PERCENTILES = ("p50", "p95", "p99")


@dataclass(frozen=True)
class Subject:
    """One run to report."""

    summary: Summary
    run: Run


def page(title: str, notes: Sequence[str], targets: Targets, subjects: Sequence[Subject]) -> str:
    """The page. `notes` are shown on top: what the profile is, above all."""
    body = [
        f"<h1>{html.escape(title)}</h1>", *(f'<p class="note">{html.escape(note)}</p>' for note in notes),
        f"<p>Targets: TTFT {targets.ttft_s * 1e3:g} ms, ITL {targets.itl_s * 1e3:g} ms. {_DEFINITIONS}</p>",
        _table([subject.summary for subject in subjects]),
        *(part for subject in subjects for part in _section(subject, targets)),
    ]
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>'
            f"<body>{''.join(body)}</body></html>\n")


def _table(summaries: Sequence[Summary]) -> str:
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(summary)) + "</tr>" for summary in summaries)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _cells(summary: Summary) -> tuple[str, ...]:
    scale_up = "" if summary.scale_up_s is None else f"{summary.scale_up_s:.0f}"
    return (
        summary.policy, str(summary.requests), str(summary.good), f"{summary.goodput_per_gpu_hour:.0f}", f"{summary.sla_attainment:.1%}",
        f"{summary.gpu_hours:.2f}", f"{summary.mean_gpus:.2f}", milliseconds(summary.ttft_s), milliseconds(summary.itl_s),
        str(summary.oscillations), scale_up,
    )


def milliseconds(seconds: Sequence[float]) -> str:
    """`1/2/3`, in ms; `never` for what never came."""
    return "/".join(f"{value * 1e3:.0f}" if math.isfinite(value) else "never" for value in seconds)


def _section(subject: Subject, targets: Targets) -> list[str]:
    summary, run = subject.summary, subject.run
    return [f"<h2>{html.escape(summary.policy)}</h2>", _requests_chart(summary.intervals), _workers_chart(run),
            _latency_chart("TTFT", [interval.ttft_s for interval in summary.intervals], summary.intervals, targets.ttft_s),
            _latency_chart("ITL", [interval.itl_s for interval in summary.intervals], summary.intervals, targets.itl_s)]


def _requests_chart(intervals: Sequence[Interval]) -> str:
    lengths = [after.begin_s - before.begin_s for before, after in itertools.pairwise(intervals)]
    length = lengths[0] if lengths else 60.0
    xs = [interval.begin_s for interval in intervals]
    lines = [Line("arrived", xs, [interval.requests / length for interval in intervals]),
             Line("good", xs, [interval.good / length for interval in intervals])]
    return chart("Requests", "s", "requests/s", lines)


def _workers_chart(run: Run) -> str:
    xs = [tick.at_s for tick in run.ticks]
    lines = []
    for role in run.ticks[0].wanted if run.ticks else ():
        lines.append(Line(f"{role} wanted", xs, [tick.wanted[role] for tick in run.ticks], stairs=True, dashed=True))
        lines.append(Line(f"{role} ready", xs, [tick.ready[role] for tick in run.ticks], stairs=True))
    return chart("Workers", "s", "workers", lines)


def _latency_chart(name: str, percentiles: Sequence[Sequence[float]], intervals: Sequence[Interval], target_s: float) -> str:
    xs = [interval.begin_s for interval in intervals]
    lines = [Line(label, xs, [row[index] * 1e3 if row else math.nan for row in percentiles]) for index, label in enumerate(_PERCENTILES)]
    lines.append(Line("target", xs, [target_s * 1e3] * len(xs), dashed=True))
    return chart(f"{name} of requests by arrival", "s", "ms", lines, y_top=target_s * 4e3)
