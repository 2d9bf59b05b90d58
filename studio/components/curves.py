"""A quality curve over the frames of a clip as HTML: a click seeks there, which a gr.Plot cannot tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

MOST_LABELS = 9  # frame numbers along the axis
WANTED_TICKS = 4
EQUAL = "Every frame equals the reference, so there is nothing to draw."


class Curve(NamedTuple):
    """One recipe's line. None is a frame without a finite value; `worst` is marked."""

    title: str
    colour: str
    values: Sequence[float | None]
    worst: int | None


def panel(name: str, title: str, curves: Sequence[Curve], digits: int) -> str:
    """One chart, `name` its class; every frame has the same width, and a click into it is a click on the frame."""
    finite = [value for curve in curves for value in curve.values if value is not None and math.isfinite(value)]
    count = max((len(curve.values) for curve in curves), default=0)
    head = f'<b class="tr-map-title">{escape(title)}</b>'
    if not finite:
        return f'<div class="tr-curve {name}">{head}<p class="tr-small">{EQUAL}</p></div>'
    ticks = nice_ticks(min(finite), max(finite))
    low, high = ticks[0], ticks[-1]
    lines = "".join(_line(curve, low, high) for curve in curves)
    marks = "".join(_worst(curve, low, high) for curve in curves)
    rows = "".join(
        f'<span style="top:{100 * _down(tick, low, high):.2f}%">{tick:.{_digits(ticks, digits)}f}</span>'
        for tick in ticks
    )
    rules = "".join(f'<i class="tr-curve-rule" style="top:{100 * _down(tick, low, high):.2f}%"></i>' for tick in ticks)
    every = -(-count // MOST_LABELS)
    columns = "".join(
        f'<span style="left:{100 * (frame + 0.5) / count:.2f}%">{frame}</span>' for frame in range(0, count, every)
    )
    return (
        f'<div class="tr-curve {name}">{head}<div class="tr-map-grid"><div class="tr-map-rows" aria-hidden="true">{rows}</div>'
        f'<div class="tr-curve-field" tabindex="0" role="slider" aria-label="{escape(title)}: frame" aria-valuemin="0" '
        f'aria-valuemax="{count - 1}" aria-valuenow="0">{rules}'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{lines}</svg>{marks}'
        f'<i class="tr-curve-now"></i></div><div class="tr-map-columns" aria-hidden="true">{columns}</div></div>'
        '<p class="tr-map-axis">frame</p></div>'
    )


def legend(curves: Sequence[Curve]) -> str:
    """Which line is whose."""
    names = "".join(f'<span><i style="background:{curve.colour}"></i>{escape(curve.title)}</span>' for curve in curves)
    return f'<p class="tr-curve-legend">{names}<span><i class="worst"></i>worst frame</span></p>'


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`, a few of them."""
    width = max(high - low, abs(high) * 1e-3, 1e-6)
    base = 10.0 ** math.floor(math.log10(width / WANTED_TICKS))
    step = next(base * times for times in (1, 2, 5, 10) if width / (base * times) <= WANTED_TICKS)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _line(curve: Curve, low: float, high: float) -> str:
    """The curve as strokes; a frame without a value interrupts it, and a single one between two such is a short dash."""
    count, strokes, points = len(curve.values), [], []
    for index, value in enumerate([*curve.values, None]):
        if value is not None and math.isfinite(value):
            points.append((100 * (index + 0.5) / count, 100 * _down(value, low, high)))
            continue
        if len(points) == 1:
            points.append((points[0][0] + 1.5, points[0][1]))
        if points:
            strokes.append("M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points))
        points = []
    return f'<path d="{"".join(strokes)}" stroke="{curve.colour}" fill="none" vector-effect="non-scaling-stroke"/>'


def _worst(curve: Curve, low: float, high: float) -> str:
    value = curve.values[curve.worst] if curve.worst is not None and curve.worst < len(curve.values) else None
    if curve.worst is None or value is None:
        return ""
    left = 100 * (curve.worst + 0.5) / len(curve.values)
    return (
        f'<i class="tr-curve-worst" style="left:{left:.2f}%;top:{100 * _down(value, low, high):.2f}%;'
        f'border-color:{curve.colour}"></i>'
    )


def _down(value: float, low: float, high: float) -> float:
    """How far from the top, from 0 to 1."""
    return (high - value) / (high - low)


def _digits(ticks: Sequence[float], most: int) -> int:
    """As many decimals as tell the ticks apart, at most `most`."""
    step = ticks[1] - ticks[0]
    return min(most, max(0, -math.floor(math.log10(step) + 1e-9)))
