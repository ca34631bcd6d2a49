# SPDX-License-Identifier: Apache-2.0
"""The result of a run: ratios against the baselines, one JSON object, or a table. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measures import Figures

Results = Mapping[str, Mapping[int, Figures]]
"""Target -> concurrency -> figures; what was not measured is not there."""

_RATIOS = {
    "triton_vs_inproc_c32": ("triton", "inproc", 32, "req_per_s"),
    "triton_vs_inproc_c128": ("triton", "inproc", 128, "req_per_s"),
    "openai_vs_inproc_c32": ("openai", "inproc", 32, "req_per_s"),
    "ttft_vs_inproc_c1": ("triton", "inproc", 1, "ttft_ms_p50"),
    "disagg_vs_agg_c32": ("disagg", "triton", 32, "req_per_s"),
    "disagg_ttft_vs_agg_c1": ("disagg", "triton", 1, "ttft_ms_p50"),
}
"""Name -> numerator, denominator, concurrency, figure. Ratios of req/s: more is better; of TTFT: less is."""
_COLUMNS = ("req_per_s", "output_tok_per_s", "ttft_ms_p50", "ttft_ms_p95", "itl_ms_p50", "itl_ms_p95", "chunk_gap_ms_p95",
            "tokens_per_chunk", "client_cpu")


@dataclass
class Report:
    """A run as it goes; filled level by level, so that an interrupted run still reports what it has."""

    hardware: str
    command: str
    model: str
    engine_arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    placement: Mapping[str, str]
    results: dict[str, dict[int, Figures]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, target: str, concurrency: int, figures: Figures) -> None:
        """Notes one level."""
        self.results.setdefault(target, {})[concurrency] = figures

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints; ratios that were not measured are null."""
        return {
            "hardware": self.hardware, "command": self.command, "model": self.model, "engine_arguments": dict(self.engine_arguments),
            "versions": dict(self.versions), "placement": dict(self.placement),
            "results": {
                target: {str(concurrency): figures.to_json() for concurrency, figures in levels.items()}
                for target, levels in self.results.items()
            },
            "failures": dict(self.failures),
            **ratios(self.results),
        }

    def to_text(self) -> str:
        """A table, what it was measured on, and the failures."""
        header = f"{'target':<8} {'c':>4} " + " ".join(f"{column:>16}" for column in _COLUMNS)
        rows = [_row(target, concurrency, figures) for target, levels in self.results.items() for concurrency, figures in levels.items()]
        known = [f"{name}: {value:.3g}" for name, value in ratios(self.results).items() if value is not None]
        failed = [f"FAILED {target}: {reason}" for target, reason in self.failures.items()]
        placed = [f"{target}: {where}" for target, where in self.placement.items()]
        return "\n".join([self.hardware, self.command, f"model: {self.model}", *placed, "", header, *rows, "", *known, *failed])


def ratios(results: Results) -> dict[str, float | None]:
    """All ratios, by name; None where a side is missing."""
    return {name: _ratio(results, *spec) for name, spec in _RATIOS.items()}


def _ratio(results: Results, numerator: str, denominator: str, concurrency: int, figure: str) -> float | None:
    above, below = (results.get(target, {}).get(concurrency) for target in (numerator, denominator))
    if above is None or below is None:
        return None
    return float(f"{getattr(above, figure) / getattr(below, figure):.4g}")


def _row(target: str, concurrency: int, figures: Figures) -> str:
    return f"{target:<8} {concurrency:>4} " + " ".join(f"{getattr(figures, column):>16.3f}" for column in _COLUMNS)
