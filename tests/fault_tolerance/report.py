# SPDX-License-Identifier: Apache-2.0
"""The report: a table to read, JSON to keep."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from fault_tolerance.outcomes import Phase, Row

HEAD = ("scenario", "requests", "success", "retried", "recovery", "whole again", "TTFT p50/p99 before", "during", "after",
        "end-to-end p50/p99 before", "during", "after")


def table(rows: Sequence[Row]) -> list[str]:
    """Lines; times in seconds."""
    cells = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cells(row: Row) -> tuple[str, ...]:
    phases = row.before, row.during, row.after
    return (
        row.scenario, str(row.requests), f"{row.success:.2%}", str(row.retried), f"{row.recovery_s:.1f}", f"{row.whole_s:.1f}",
        *(_pair(one, one.ttft_p50, one.ttft_p99) for one in phases), *(_pair(one, one.whole_p50, one.whole_p99) for one in phases),
    )


def _pair(phase: Phase, middle: float, high: float) -> str:
    return f"{middle:.2f}/{high:.2f}" if phase.requests else "-"


def save(rows: Sequence[Row], path: Path) -> None:
    """Rows of scenarios that are in the file already are replaced, so that a suite may be run in parts."""
    kept = {row["scenario"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    kept |= {row.scenario: {**dataclasses.asdict(row), "success": row.success} for row in rows}
    path.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
