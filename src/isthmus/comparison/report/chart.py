"""Line charts as inline SVG: a few series over steps, linear or logarithmic. Colours are the style sheet's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 40
_MOST_POINTS = 200
_COLOURS = 6
_DOTTED = 12
"""A line of at most so many points also shows the points."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """``series``: name -> (step, value) pairs by rising step. ``log`` draws values by their logarithm."""

    title: str
    series: Mapping[str, Sequence[Point]]
    log: bool = False
    x_label: str = "step"
    y_label: str = "loss"


def figure(chart: Chart, number: int) -> str:
    """The chart as a numbered HTML figure with its legend. What is not finite (or not above 0 where ``log``) is left
    out; a chart without any point says so."""
    kept = {name: _thin(_drawable(points, chart.log)) for name, points in chart.series.items()}
    kept = {name: points for name, points in kept.items() if points}
    legend = "".join(
        f'<li><svg class="key {_style(i)}" viewBox="0 0 22 8" aria-hidden="true"><path d="M1 4H21"/></svg>'
        f"{escape(name)} <span class=num>{_number(points[-1][1])}</span></li>"
        for i, (name, points) in enumerate(kept.items())
    )
    drawing = _svg(chart, kept) if kept else '<p class="nothing">no values were recorded</p>'
    return (
        f'<figure class="chart">{drawing}<ul class="legend">{legend}</ul>'
        f"<figcaption><b>Figure {number}.</b> {escape(chart.title)}</figcaption></figure>"
    )


def _svg(chart: Chart, series: Mapping[str, Sequence[Point]]) -> str:
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_low, x_high = min(0.0, *xs), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1
    x_ticks = [x for x in ticks(x_low, x_high, 5) if x_low <= x <= x_high]
    y_ticks = log_ticks(min(ys), max(ys)) if chart.log else ticks(min(ys), max(ys), 5)
    scale = math.log if chart.log else float
    y_low, y_high = scale(y_ticks[0]), scale(y_ticks[-1])
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT

    def place_x(x: float) -> str:
        return f"{_LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT):.1f}"

    def place_y(y: float) -> str:
        return f"{bottom - (scale(y) - y_low) / ((y_high - y_low) or 1.0) * (bottom - _TOP):.1f}"

    marks = [
        f'<path class="grid" d="M{_LEFT} {place_y(y)}H{right}"/>'
        f'<text x="{_LEFT - 7}" y="{place_y(y)}" dy=".33em" text-anchor="end">{_number(y)}</text>'
        for y in y_ticks
    ]
    marks += [
        f'<path class="tick" d="M{place_x(x)} {bottom}v4"/>'
        f'<text x="{place_x(x)}" y="{bottom + 16}" text-anchor="middle">{_number(x)}</text>'
        for x in x_ticks
    ]
    marks.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    marks.append(
        f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    marks.append(
        f'<text class="label" text-anchor="middle" transform="translate(11 {(_TOP + bottom) / 2:.0f}) rotate(-90)">'
        f"{escape(chart.y_label)}</text>"
    )
    lines = [
        f'<path class="line {_style(i)}" d="M{"L".join(f"{place_x(x)} {place_y(y)}" for x, y in points)}"/>'
        for i, points in enumerate(series.values())
    ]
    dots = [
        f'<circle class="dot {_style(i)}" cx="{place_x(x)}" cy="{place_y(y)}" r="2.6"/>'
        for i, points in enumerate(series.values())
        if len(points) <= _DOTTED
        for x, y in points
    ]
    title = escape(f"{chart.title}: {', '.join(series)}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(marks + lines + dots)}</svg>'


def _style(number: int) -> str:
    """The class of a series: its colour, and dashes where all colours are taken."""
    return f"s{number % _COLOURS}" + (" dashed" if number // _COLOURS % 2 else "")


def ticks(low: float, high: float, about: int) -> list[float]:
    """About ``about`` round values (1, 2 or 5 times a power of ten apart) that enclose ``low`` and ``high``."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-30):
        margin = size / 2 if size > 1e-30 else 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose ``low`` and ``high`` (> 0), with 2 and 5 between where there are at most two
    decades and 3 where there are three, and only those needed at the ends."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1, 3) if len(decades) == 4 else (1,)
    values = [f * 10.0**d for d in decades for f in factors]
    first = max((i for i, v in enumerate(values) if v <= low), default=0)
    last = min((i for i, v in enumerate(values) if v >= high), default=len(values) - 1)
    return values[first : last + 1]


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]


def _thin(points: list[Point]) -> list[Point]:
    """At most a few hundred points: means of equal runs; the last point stays as it is."""
    if len(points) <= _MOST_POINTS:
        return points
    bounds = [round(i * (len(points) - 1) / _MOST_POINTS) for i in range(_MOST_POINTS + 1)]
    runs = [points[a:b] for a, b in pairwise(bounds)]
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs] + [points[-1]]


def _number(value: float) -> str:
    """Short: 1500 -> 1.5k, 0.25 -> 0.25, 3e-05 -> 3e-05."""
    if abs(value) >= 1000:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{letter}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")
