"""Plots as inline SVG: axes, points, lines, bars. Knows coordinates and classes; colours are the page's affair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

Point = tuple[float, float]
Scale = Literal["linear", "log"]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its name, the data's range, its scale and how ticks are written."""

    title: str
    low: float
    high: float
    scale: Scale = "linear"
    write: Callable[[float], str] = field(default=lambda value: f"{value:g}")

    def place(self, value: float) -> float:
        """Where `value` lies, 0 at `low` and 1 at `high`."""
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Three to seven round values."""
        return _log_ticks(self.low, self.high) if self.scale == "log" else _linear_ticks(self.low, self.high)


def axis_over(
    values: Sequence[float],
    title: str,
    *,
    scale: Scale = "linear",
    write: Callable[[float], str] | None = None,
    pad: float = 0.06,
) -> Axis:
    """An axis that holds `values` with some room at both ends; a log axis leaves out what is not above zero."""
    usable = [value for value in values if math.isfinite(value) and (scale == "linear" or value > 0)]
    low, high = (min(usable), max(usable)) if usable else (1.0, 2.0)
    if scale == "log":
        room = max((high / low) ** pad, 1.05)
        low, high = low / room, high * room
    else:
        room = (high - low) * pad or abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    return Axis(title, low, high, scale, write or (lambda value: f"{value:g}"))


@dataclass(slots=True)
class Plot:
    """A picture with two axes that is drawn upon; `text` is the SVG element."""

    x: Axis
    y: Axis
    title: str
    width: int = 560
    height: int = 320
    left: int = 64
    right: int = 16
    top: int = 12
    bottom: int = 46
    _marks: list[str] = field(default_factory=list)

    def points(self, points: Sequence[Point], *, css: str, radius: float = 3, tips: Sequence[str] = ()) -> None:
        """Dots, each with a tip shown under the mouse."""
        for index, point in enumerate(points):
            if not self._inside(point):
                continue
            x, y = self._at(point)
            tip = f"<title>{escape(tips[index])}</title>" if index < len(tips) else ""
            self._marks.append(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{tip}</circle>')

    def line(self, points: Sequence[Point], *, css: str, steps: bool = False) -> None:
        """A line through `points`; with `steps`, each value holds until the next."""
        usable = [self._at(point) for point in points if self._inside(point)]
        if len(usable) < 2:
            return
        path = f"M{usable[0][0]:.1f} {usable[0][1]:.1f}"
        for x, y in usable[1:]:
            path += f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}"
        self._marks.append(f'<path class="{css}" d="{path}"/>')

    def horizontal(self, value: float, *, css: str, label: str = "", below: bool = False) -> None:
        """A line across at `value`, with a label at its right end, above it or `below`."""
        self.line([(self.x.low, value), (self.x.high, value)], css=css)
        if label and self._inside((self.x.high, value)):
            x, y = self._at((self.x.high, value))
            place = f'x="{x:.1f}" y="{y + (13 if below else -5):.1f}" text-anchor="end"'
            self._marks.append(f'<text class="tick" {place}>{escape(label)}</text>')

    def vertical(self, value: float, *, css: str) -> None:
        """A line from bottom to top at `value`."""
        self.line([(value, self.y.low), (value, self.y.high)], css=css)

    @property
    def text(self) -> str:
        """The SVG element."""
        body = "".join([*self._x_axis(), *self._y_axis(), *self._marks])
        label = escape(self.title, quote=True)
        return (
            f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{label}">{body}</svg>'
        )

    def _inside(self, point: Point) -> bool:
        pairs = zip((self.x, self.y), point, strict=True)
        return all(math.isfinite(value) and axis.low <= value <= axis.high for axis, value in pairs)

    def _at(self, point: Point) -> Point:
        across, up = self.x.place(point[0]), self.y.place(point[1])
        inner_width, inner_height = self.width - self.left - self.right, self.height - self.top - self.bottom
        return self.left + across * inner_width, self.top + (1 - up) * inner_height

    def _x_axis(self) -> list[str]:
        base = self.height - self.bottom
        parts = [f'<path class="axis" d="M{self.left} {base}H{self.width - self.right}"/>']
        for value in self.x.ticks():
            x, _ = self._at((value, self.y.low))
            parts.append(f'<path class="axis" d="M{x:.1f} {base}v4"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{_t(self.x, value)}</text>'
            )
        middle = (self.left + self.width - self.right) / 2
        parts.append(
            f'<text class="name" x="{middle}" y="{self.height - 8}" text-anchor="middle">{escape(self.x.title)}</text>'
        )
        return parts

    def _y_axis(self) -> list[str]:
        parts = []
        for value in self.y.ticks():
            _, y = self._at((self.x.low, value))
            parts.append(f'<path class="grid" d="M{self.left} {y:.1f}H{self.width - self.right}"/>')
            parts.append(
                f'<text class="tick" x="{self.left - 7}" y="{y + 4:.1f}" text-anchor="end">{_t(self.y, value)}</text>'
            )
        middle = (self.top + self.height - self.bottom) / 2
        turned = f'transform="translate(14 {middle}) rotate(-90)"'
        parts.append(f'<text class="name" {turned} text-anchor="middle">{escape(self.y.title)}</text>')
        return parts


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a bar chart: `kept` over `full`, a text at its end, and a tip."""

    label: str
    kept: float
    full: float
    text: str
    css: str = "bar"


def bars(rows: Sequence[Bar], title: str, *, width: int = 900, row_height: int = 20) -> str:
    """Horizontal bars, kept over full, in the order given; all on one scale."""
    longest = max((row.full for row in rows), default=1.0)
    left = 24 + round(6.8 * min(38, max((len(row.label) for row in rows), default=0)))
    room = width - left - 150
    parts = []
    for index, row in enumerate(rows):
        y = index * row_height + 3
        height, baseline = row_height - 6, y + row_height - 9
        full, kept = room * row.full / longest, room * row.kept / longest
        name = row.label if len(row.label) <= 38 else "…" + row.label[-37:]
        parts.append(
            f"<g><title>{escape(row.label)}: {escape(row.text)}</title>"
            f'<text class="tick" x="{left - 8}" y="{baseline}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="bar-full {row.css}-full" x="{left}" y="{y}" width="{full:.1f}" height="{height}" rx="2"/>'
            f'<rect class="{row.css}" x="{left}" y="{y}" width="{kept:.1f}" height="{height}" rx="2"/>'
            f'<text class="tick" x="{left + full + 8:.1f}" y="{baseline}">{escape(row.text)}</text></g>'
        )
    label = escape(title, quote=True)
    box = f"0 0 {width} {len(rows) * row_height + 4}"
    return f'<svg class="plot wide" viewBox="{box}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _t(axis: Axis, value: float) -> str:
    return escape(axis.write(value))


def _linear_ticks(low: float, high: float) -> list[float]:
    span = high - low
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next((factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / 8)]
    return [tick for tick in _linear_ticks(low, high) if tick > 0]
