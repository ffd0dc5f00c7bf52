"""The two plots of an HTML report as numbers: the coordinates of an SVG, in which y grows downwards.

Each plot is drawn at two widths, because letters in a scaled drawing would be too small to read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WIDTHS = {"wide": 860.0, "narrow": 350.0}
TICKS = {"wide": 12, "narrow": 6}  # on the horizontal axis, at most
Y_TICKS = 8
NEGLIGIBLE = 0.01  # the fraction of the smallest values that is not drawn
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Series:
    """A line or an area. `key` is the name of its colour, `title` its entry in the legend."""

    key: str
    title: str
    path: str  # of an SVG <path>
    points: tuple[tuple[float, float, str], ...] = ()  # x, y and the text that a pointer shows there


@dataclass(frozen=True)
class Plot:
    size: str  # "wide" or "narrow"
    width: float
    height: float
    left: float  # where the axes begin
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    mark: Tick | None = None  # a vertical line
    cut: bool = False  # whether values to the left of the plot were left out


@dataclass(frozen=True)
class Scale:
    """A linear map from values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        fraction = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + fraction * (self.end - self.start), 1)


class Frame(NamedTuple):
    """The size of a plot, and where its axes and its values are."""

    height: float
    left: float
    bottom: float
    top: float
    inset: float  # between the vertical axis and the first value
    right: float  # between the last value and the edge


SizeOfPlot = tuple[str, float, float, float, float]  # the first fields of a Plot


def _at_each_width(
    frame: Frame, x_range: tuple[float, float], y_range: tuple[float, float]
) -> Iterator[tuple[SizeOfPlot, Scale, Scale, int]]:
    """The size of a plot, its scales, and its most ticks."""
    for size, width in WIDTHS.items():
        x = Scale(*x_range, frame.left + frame.inset, width - frame.right)
        y = Scale(*y_range, frame.bottom, frame.top)
        yield (size, width, frame.height, frame.left, frame.bottom), x, y, TICKS[size]


# --- Magnitudes of errors and of the adapter's effect ---

OF_MAGNITUDES = Frame(height=190.0, left=8.0, bottom=160.0, top=24, inset=0, right=22)


def magnitudes(series: Sequence[tuple[str, str, Iterable[Mapping[str, Any]]]], limit: float | None) -> list[Plot]:
    """Areas over a logarithmic axis of magnitudes. Each element counts once, in whichever case it is.

    `series` are key, title and histograms, which are added up. A line marks `limit`, the allowed rmse. Empty where
    every value is 0.
    """
    counted = [(key, title, _add_up(histograms)) for key, title, histograms in series]
    exponents = [exponent for _, _, fractions in counted for exponent in fractions]
    if not exponents:
        return []
    # An empty bin on both sides, and the limit within the plot.
    marks = [math.log2(limit)] if limit else []
    lows = [_smallest(fractions) for _, _, fractions in counted if fractions]
    low, high = min([*lows, *marks]) - 1, max([*exponents, *marks]) + 2
    tallest = max(fraction for _, _, fractions in counted for fraction in fractions.values())

    return [
        Plot(
            *size,
            x_ticks=tuple(_decades(low / math.log2(10), high / math.log2(10), x, ticks, log2=True)),
            y_ticks=(),
            series=tuple(
                Series(key, title, _steps({e: fraction for e, fraction in fractions.items() if e >= low}, x, y))
                for key, title, fractions in counted
                if fractions
            ),
            mark=Tick(x(math.log2(limit)), "allowed rmse") if limit else None,
            cut=min(exponents) < low,
        )
        for size, x, y, ticks in _at_each_width(OF_MAGNITUDES, (low, high), (0, tallest))
    ]


def _add_up(histograms: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Binary exponent -> fraction of all elements. Elements that are 0 are counted, and have no exponent."""
    counts: dict[int, int] = {}
    total = 0
    for histogram in histograms:
        total += histogram["zeros"] + sum(histogram["counts"])
        for exponent, count in enumerate(histogram["counts"], histogram["first"]):
            counts[exponent] = counts.get(exponent, 0) + count
    return {exponent: count / total for exponent, count in sorted(counts.items()) if count}


def _smallest(fractions: Mapping[int, float]) -> int:
    """The first exponent that is drawn. A few elements are always close to 0, at any exponent."""
    below = 0.0
    for exponent, fraction in fractions.items():
        below += fraction
        if below >= NEGLIGIBLE * sum(fractions.values()):
            return exponent
    return max(fractions)


def _steps(fractions: Mapping[int, float], x: Scale, y: Scale) -> str:
    first, last = min(fractions), max(fractions)
    path = [f"M{x(first)} {y(0)}"]
    for exponent in range(first, last + 1):
        path.append(f"V{y(fractions.get(exponent, 0.0))}H{x(exponent + 1)}")
    return "".join([*path, f"V{y(0)}Z"])


# --- Errors layer by layer ---

OF_LAYERS = Frame(height=260.0, left=46.0, bottom=226.0, top=18, inset=10, right=14)
ERROR_KINDS = (
    ("effect", "effect", "the adapter's effect"),
    ("deployed_error", "own", "PyTorch's own error"),
    ("error", "error", "the candidate's error"),
)


def layers(
    measured: Sequence[Mapping[str, Any]], first: str | None, kinds: Sequence[tuple[str, str, str]] = ERROR_KINDS
) -> list[Plot]:
    """Lines over the layers in execution order, on a logarithmic axis of magnitudes.

    `kinds` are the fields to draw, with the names of their colours and their entries in the legend. A vertical line
    marks the layer `first`. Empty where no value can be drawn.
    """
    values = [value for layer in measured for field, _, _ in kinds if (value := layer.get(field))]
    if not values:
        return []
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    marked = next((number for number, layer in enumerate(measured) if layer["name"] == first), None)

    return [
        Plot(
            *size,
            x_ticks=tuple(_numbers(len(measured), x, ticks)),
            y_ticks=tuple(_decades(low, high, y, Y_TICKS)),
            series=tuple(
                _line(key, title, [(layer["name"], layer.get(field)) for layer in measured], x, y)
                for field, key, title in kinds
            ),
            mark=None if marked is None else Tick(x(marked), "first to differ"),
        )
        for size, x, y, ticks in _at_each_width(OF_LAYERS, (0, max(1, len(measured) - 1)), (low, high))
    ]


def _line(key: str, title: str, values: Sequence[tuple[str, float | None]], x: Scale, y: Scale) -> Series:
    """A line that is interrupted where nothing was measured, and at 0, which has no logarithm."""
    path, points, drawing = [], [], False
    for number, (name, value) in enumerate(values):
        if value:
            at = x(number), y(math.log10(value))
            path.append(f"{'L' if drawing else 'M'}{at[0]} {at[1]}")
            points.append((*at, f"{name}: {value:.3g}, {title}"))
        drawing = bool(value)
    return Series(key, title, "".join(path), tuple(points))


# --- Ticks ---


def _numbers(count: int, x: Scale, at_most: int) -> Iterator[Tick]:
    step = next(
        step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if count <= step * at_most or step == count
    )
    for number in range(0, count, step):
        yield Tick(x(number), str(number + 1))


def _decades(low: float, high: float, scale: Scale, at_most: int, *, log2: bool = False) -> Iterator[Tick]:
    first, last = math.ceil(low), math.floor(high)
    step = max(1, math.ceil((last - first + 1) / at_most))
    for decade in range(first, last + 1):
        if decade % step == 0:
            yield Tick(scale(decade * math.log2(10) if log2 else decade), "10" + str(decade).translate(SUPERSCRIPTS))
