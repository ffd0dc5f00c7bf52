"""The two plots of the page as numbers: what an SVG needs, in its own coordinates (y grows downwards).

Each is drawn at two widths, since letters in a scaled drawing would be too small to read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTHS = {"wide": 860, "narrow": 350}
TICKS = {"wide": 12, "narrow": 6}  # on a logarithmic axis, at most
NEGLIGIBLE = 0.01  # the share of the smallest numbers that is not drawn
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Series:
    """A line or an area: `key` is its colour's name, `title` what the legend calls it."""

    key: str
    title: str
    path: str  # of an SVG <path>
    points: tuple[tuple[float, float, str], ...] = ()  # x, y and what a pointer is told there


@dataclass(frozen=True)
class Drawing:
    size: str  # "wide" or "narrow"
    width: float
    height: float
    left: float  # where the axes begin
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    mark: Tick | None = None  # a vertical line
    cut: bool = False  # whether something lies to the left of it


@dataclass(frozen=True)
class Scale:
    """From decades, or whatever is counted, to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


# How large errors are beside what the adapter does


def histogram(series: Sequence[tuple[str, str, Iterable[Mapping[str, Any]]]], limit: float | None) -> list[Drawing]:
    """Areas over a logarithmic axis of magnitudes: each element counts once, whatever the case.

    `series` are key, title and histograms that are put together; `limit` is where a line stands: the error that
    is allowed in the mean. Empty where every number is 0.
    """
    counted = [(key, title, _together(histograms)) for key, title, histograms in series]
    exponents = [exponent for _, _, shares in counted for exponent in shares]
    if not exponents:
        return []
    # A bin of white on both sides; the limit is on the sheet, too.
    marks = [math.log2(limit)] if limit else []
    lows = [_smallest(shares) for _, _, shares in counted if shares]
    low, high = min([*lows, *marks]) - 1, max([*exponents, *marks]) + 2
    tallest = max(share for _, _, shares in counted for share in shares.values())
    drawings = []
    for size, width in WIDTHS.items():
        height, left, bottom = 190.0, 8.0, 160.0
        x, y = Scale(low, high, left, width - 22), Scale(0, tallest, bottom, 24)
        drawings.append(
            Drawing(
                size,
                width,
                height,
                left,
                bottom,
                x_ticks=tuple(_decades(low / math.log2(10), high / math.log2(10), x, TICKS[size], log2=True)),
                y_ticks=(),
                series=tuple(
                    Series(key, title, _steps({e: share for e, share in shares.items() if e >= low}, x, y))
                    for key, title, shares in counted
                    if shares
                ),
                mark=Tick(x(math.log2(limit)), "allowed in the mean") if limit else None,
                cut=min(exponents) < low,
            )
        )
    return drawings


def _together(histograms: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Binary exponent -> share of all elements; those that are 0 have no place on a logarithmic axis."""
    counts: dict[int, int] = {}
    total = 0
    for there in histograms:
        total += there["zeros"] + sum(there["counts"])
        for exponent, count in enumerate(there["counts"], there["first"]):
            counts[exponent] = counts.get(exponent, 0) + count
    return {exponent: count / total for exponent, count in sorted(counts.items()) if count}


def _smallest(shares: Mapping[int, float]) -> int:
    """Where the first of the numbers worth drawing lie: a few are always next to 0, wherever that may be."""
    below = 0.0
    for exponent, share in shares.items():
        below += share
        if below >= NEGLIGIBLE * sum(shares.values()):
            return exponent
    return max(shares)


def _steps(shares: Mapping[int, float], x: Scale, y: Scale) -> str:
    first, last = min(shares), max(shares)
    path = [f"M{x(first)} {y(0)}"]
    for exponent in range(first, last + 1):
        path.append(f"V{y(shares.get(exponent, 0.0))}H{x(exponent + 1)}")
    return "".join([*path, f"V{y(0)}Z"])


# The error, layer by layer

OF_LAYERS = (
    ("effect", "effect", "what the adapter does"),
    ("deployed_error", "own", "PyTorch's own error"),
    ("error", "error", "the candidate's error"),
)


def layers(
    there: Sequence[Mapping[str, Any]], first: str | None, kinds: Sequence[tuple[str, str, str]] = OF_LAYERS
) -> list[Drawing]:
    """Lines over the layers, in the order in which the model runs them, on a logarithmic axis of magnitudes.

    `kinds` are the fields that are drawn, with their colours' names and what the legend calls them.
    """
    values = [value for layer in there for field, _, _ in kinds if (value := layer.get(field))]
    if not values:
        return []
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    place = next((number for number, layer in enumerate(there) if layer["name"] == first), None)
    drawings = []
    for size, width in WIDTHS.items():
        height, left, bottom = 260.0, 46.0, 226.0
        x, y = Scale(0, max(1, len(there) - 1), left + 10, width - 14), Scale(low, high, bottom, 18)
        drawings.append(
            Drawing(
                size,
                width,
                height,
                left,
                bottom,
                x_ticks=tuple(_numbers(len(there), x, TICKS[size])),
                y_ticks=tuple(_decades(low, high, y, 8)),
                series=tuple(
                    _line(key, title, [(layer["name"], layer.get(field)) for layer in there], x, y)
                    for field, key, title in kinds
                ),
                mark=None if place is None else Tick(x(place), "first to differ"),
            )
        )
    return drawings


def _line(key: str, title: str, values: Sequence[tuple[str, float | None]], x: Scale, y: Scale) -> Series:
    """A line that is broken where nothing was measured, or where the logarithm of 0 would be."""
    path, points, drawing = [], [], False
    for number, (name, value) in enumerate(values):
        if value:
            there = x(number), y(math.log10(value))
            path.append(f"{'L' if drawing else 'M'}{there[0]} {there[1]}")
            points.append((*there, f"{name}: {value:.3g}, {title}"))
        drawing = bool(value)
    return Series(key, title, "".join(path), tuple(points))


def _numbers(count: int, x: Scale, at_most: int) -> Iterable[Tick]:
    step = next(
        step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if count <= step * at_most or step == count
    )
    for number in range(0, count, step):
        yield Tick(x(number), str(number + 1))


def _decades(low: float, high: float, scale: Scale, at_most: int, *, log2: bool = False) -> Iterable[Tick]:
    first, last = math.ceil(low), math.floor(high)
    step = max(1, math.ceil((last - first + 1) / at_most))
    for decade in range(first, last + 1):
        if decade % step == 0:
            yield Tick(scale(decade * math.log2(10) if log2 else decade), "10" + str(decade).translate(SUPERSCRIPTS))
