"""The plots of an HTML report as numbers: each value is where its magnitude belongs."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from lora_export.report import plots
from lora_export.report.json_document import as_dict
from lora_export.verification import parity
from support.verdicts import LAYERS


def counted(*numbers: float) -> dict[str, Any]:
    return as_dict(parity.figures.histogram(np.array(numbers)))


def heights(path: str) -> list[float]:
    """The height of each step of an area over its bottom, from left to right."""
    bottom = float(path.split(" ")[1].split("V")[0])
    return [round(bottom - float(y), 1) for y in re.findall(r"V([\d.]+)H", path)]


def test_areas_are_as_high_as_their_fractions() -> None:
    wide, _ = plots.magnitudes(
        [("effect", "e", [counted(1, 1, 1, 2)]), ("error", "o", [counted(0.25), counted(0.25, 0, 0)])], limit=0.5
    )
    effect, error = (heights(series.path) for series in wide.series)
    tallest = 136.0
    assert effect == [tallest, pytest.approx(tallest / 3, abs=0.1)]
    assert error == [pytest.approx(tallest * (2 / 4) / (3 / 4), abs=0.1)], "half of its elements; zeros count too"
    assert wide.mark is not None and wide.x_ticks and not wide.cut


def test_tiny_values_are_left_out_of_the_plot() -> None:
    series = ("error", "o", [counted(1e-300, *[1e-3] * 200, *[1e-2] * 200)])
    wide, narrow = plots.magnitudes([series], limit=None)
    assert wide.cut and {tick.label for tick in wide.x_ticks} <= {"10⁻³", "10⁻²", "10⁻¹"}
    for plot in (wide, narrow):
        positions = [float(x) for x in re.findall(r"H([\d.]+)", plot.series[0].path)]
        assert min(positions) > plot.left and max(positions) < plot.width


def test_no_values_have_no_plot() -> None:
    assert plots.magnitudes([("error", "o", [counted(0, 0)])], limit=None) == []
    assert plots.layers([], None) == []
    assert plots.layers([{"name": "a", "error": 0.0, "deployed_error": None, "effect": None}], None) == []


def test_layers_are_on_a_logarithmic_axis() -> None:
    wide = plots.layers(LAYERS, "encoder.1")[0]
    by_key = {series.key: series for series in wide.series}
    (x0, low, first), (x1, high, _) = by_key["error"].points
    decade = (wide.bottom - 18) / 6  # from 1e-7 to 0.1
    assert low - high == pytest.approx(5 * decade, abs=0.2)
    assert first == "encoder.0: 1e-07, the candidate's error"
    assert wide.mark is not None and wide.mark.at == x1 > x0
    assert [tick.label for tick in wide.x_ticks] == ["1", "2", "3"]
    assert math.isclose(by_key["effect"].points[0][0], x1)


def test_a_thousand_layers_have_few_labels() -> None:
    many = [
        {"name": str(n), "error": 1e-7 * 2.0 ** (n % 50), "deployed_error": 1e-7, "effect": 1.0} for n in range(1000)
    ]
    for plot in plots.layers(many, None):
        assert len(plot.x_ticks) <= plots.TICKS[plot.size] and len(plot.y_ticks) <= plots.Y_TICKS
        assert plot.mark is None
