"""A line chart as SVG: no library, no script, readable in a browser and in a text editor."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")
Points = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines by name, each (x, y). The y axis spans most of the data, so that a few huge losses do not flatten it."""

    title: str
    lines: Mapping[str, Points]
    x_label: str = "images"
    width: int = 720
    height: int = 260
    margin: tuple[int, int, int, int] = (28, 16, 36, 64)

    def svg(self) -> str:
        """The SVG element."""
        top, right, bottom, left = self.margin
        across, down = self.width - left - right, self.height - top - bottom
        (x0, x1), (y0, y1) = self._spans()

        def place(x: float, y: float) -> tuple[float, float]:
            y = min(max(y, y0), y1)
            return left + across * (x - x0) / (x1 - x0), top + down * (1 - (y - y0) / (y1 - y0))

        parts = [f'<text x="{left}" y="18" class="title">{html.escape(self.title)}</text>']
        for y in ticks(y0, y1):
            _, row = place(x0, y)
            parts.append(f'<line x1="{left}" x2="{left + across}" y1="{row:.1f}" y2="{row:.1f}" class="grid"/>')
            parts.append(f'<text x="{left - 6}" y="{row + 4:.1f}" class="tick" text-anchor="end">{short(y)}</text>')
        for x in ticks(x0, x1):
            column, _ = place(x, y0)
            foot = top + down + 16
            parts.append(f'<text x="{column:.1f}" y="{foot}" class="tick" text-anchor="middle">{short(x)}</text>')
        for (name, (xs, ys)), colour in zip(self.lines.items(), COLOURS, strict=False):
            points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in thinned(xs, ys))
            parts.append(f'<polyline points="{points}" stroke="{colour}" class="line"/>')
            parts.append(self._legend(name, colour))
        parts.append(
            f'<text x="{left + across}" y="{self.height - 4}" class="tick" text-anchor="end">{self.x_label}</text>'
        )
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>'

    def _legend(self, name: str, colour: str) -> str:
        place = self.width - self.margin[1] - 110 * (len(self.lines) - list(self.lines).index(name))
        return f'<text x="{place}" y="18" class="tick" fill="{colour}">{html.escape(name)}</text>'

    def _spans(self) -> tuple[tuple[float, float], tuple[float, float]]:
        xs = [x for x_values, _ in self.lines.values() for x in x_values]
        ys = sorted(y for _, y_values in self.lines.values() for y in y_values)
        if not xs:
            return (0.0, 1.0), (0.0, 1.0)
        low, high = ys[0], ys[min(len(ys) - 1, math.ceil(0.98 * len(ys)))]
        spread = (high - low) or abs(high) or 1.0
        return (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), (low - 0.05 * spread, high + 0.05 * spread)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values inside a span, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= raw), 10 * power)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it: 0.25, 1,500, 250k, 1.2M."""
    for limit, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e6 if letter == 'M' else 1e3):g}{letter}"
    return f"{value:,.6g}"


def thinned(xs: Sequence[float], ys: Sequence[float], limit: int = 600) -> list[tuple[float, float]]:
    """At most `limit` points: means of equal stretches."""
    stride = -(-len(xs) // limit) if xs else 1
    groups = [(xs[i : i + stride], ys[i : i + stride]) for i in range(0, len(xs), stride)]
    return [(sum(x) / len(x), sum(y) / len(y)) for x, y in groups]


def smoothed(ys: Sequence[float], share: float = 0.02) -> list[float]:
    """A running mean over `share` of the points on either side."""
    reach = max(1, round(share * len(ys)))
    sums = [0.0]
    for y in ys:
        sums.append(sums[-1] + y)
    edges = [(max(0, i - reach), min(len(ys), i + reach + 1)) for i in range(len(ys))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in edges]
