# SPDX-License-Identifier: Apache-2.0
"""Line charts as inline SVG: enough for reports, with no plotting library. Pure."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 28, 36
_LEGEND = 110
"""Where the labels of lines begin, right of the axis."""
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")


@dataclass(frozen=True)
class Line:
    """Points in order of x; those that are not finite are gaps."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    stairs: bool = False
    """Whether a value holds until the next point, as numbers of workers do."""
    dashed: bool = False


def chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], y_top: float | None = None) -> str:
    """One `<svg>`. `y_top` cuts off what is higher, so that an overload doesn't flatten the rest."""
    frame = _Frame(lines, y_top)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-family="sans-serif" font-size="11">',
        f'<text x="{_LEFT}" y="14" font-size="13" font-weight="bold">{html.escape(title)}</text>',
        *frame.axes(x_label, y_label),
        *(part for index, line in enumerate(lines) for part in frame.line(line, index)),
        "</svg>",
    ]
    return "".join(parts)


class _Frame:
    """Data to pixels."""

    def __init__(self, lines: Sequence[Line], y_top: float | None) -> None:
        xs = [x for line in lines for x in line.xs if math.isfinite(x)] or [0.0, 1.0]
        ys = [y for line in lines for y in line.ys if math.isfinite(y)] or [1.0]
        self._label_width = min(130.0, (WIDTH - _LEFT - _LEGEND) / max(1, len(lines)))
        self._x0, self._x1 = min(xs), max(max(xs), min(xs) + 1e-9)
        self._y1 = max(min(max(ys), math.inf if y_top is None else y_top), 1e-9) * 1.05

    def x(self, value: float) -> float:
        return _LEFT + (value - self._x0) / (self._x1 - self._x0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - min(max(value / self._y1, 0.0), 1.0) * (HEIGHT - _BOTTOM - _TOP)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = [f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#333"/>']
        for value in ticks(0.0, self._y1):
            at = self.y(value)
            parts.append(f'<path d="M{_LEFT} {at:.1f}H{right}" stroke="#ddd"/>'
                         f'<text x="{_LEFT - 4}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
        parts += [self._x_mark(value) for value in ticks(self._x0, self._x1)]
        parts.append(f'<text x="{right}" y="{HEIGHT - 6}" text-anchor="end">{html.escape(x_label)}</text>')
        parts.append(f'<text x="{_LEFT}" y="{_TOP - 2}" fill="#555">{html.escape(y_label)}</text>')
        return parts

    def _x_mark(self, value: float) -> str:
        return f'<text x="{self.x(value):.1f}" y="{HEIGHT - _BOTTOM + 14}" text-anchor="middle">{value:g}</text>'

    def line(self, line: Line, index: int) -> list[str]:
        color, dash = COLORS[index % len(COLORS)], ' stroke-dasharray="5 4"' if line.dashed else ""
        label_x = _LEFT + _LEGEND + self._label_width * index
        return [
            f'<path d="{self._path(line)}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>',
            f'<text x="{label_x:.0f}" y="{_TOP - 2}" fill="{color}">{html.escape(line.label)}</text>',
        ]

    def _path(self, line: Line) -> str:
        parts: list[str] = []
        pen_down = False
        for x, y in zip(line.xs, line.ys, strict=True):
            if not math.isfinite(y):
                pen_down = False
                continue
            if pen_down and line.stairs:
                parts.append(f"H{self.x(x):.1f}")
            parts.append(f"{'L' if pen_down else 'M'}{self.x(x):.1f} {self.y(y):.1f}")
            pen_down = True
        return "".join(parts)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About so many round numbers within [low, high]."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]
