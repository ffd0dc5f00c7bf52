"""The features gate: errors in features that are small beside the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export.verification.parity import (
    Case,
    Outcome,
    judge,
    judging,
    small_features,
)
from support.parity_cases import TRIED, make


def uneven(error: float, *, rows: int = 8, scale: float = 1e-4, name: str = "first", own: float = 1e-6) -> Case:
    """[rows, 128] The last two columns are small, and the candidate's relative error in them is `error`."""
    size = np.where(np.arange(128) < 126, 1.0, scale)
    rng = np.random.default_rng(rows)
    truth, effect, noise = (rng.normal(size=(rows, 128)) for _ in range(3))
    errors = np.where(size == 1.0, own * noise, error * scale * noise)
    return make(
        own=own * size * np.roll(noise, 1, 0), error=errors, effect=0.3 * size * effect, truth=size * truth, name=name
    )


def test_only_features_gate_detects_error_in_small_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 % of a column that is 1e-4 of the others: no more than PyTorch's own error in those.
    cases = [uneven(0.01), uneven(0.01, rows=5, name="second")]
    verdict = judge(cases, sensitivity=TRIED)
    assert verdict.outcome is Outcome.DIFFERENT
    assert [reason.gate for reason in verdict.reasons] == ["features"]
    assert "y: 2 features of 128 along axis 1, small beside the others" in str(verdict)
    monkeypatch.setattr(judging, "small_feature_reasons", lambda *_: ())
    assert judge(cases, sensitivity=TRIED).same


def test_small_features_as_close_as_pytorchs_are_same() -> None:
    assert judge([uneven(2e-6), uneven(2e-6, rows=5, name="second")], sensitivity=TRIED).same


def test_remainder_of_cancellation_is_no_feature() -> None:
    cases = [uneven(1e3, scale=1e-12), uneven(1e3, rows=5, scale=1e-12, name="second")]
    assert judge(cases, sensitivity=TRIED).same


def test_feature_of_few_values_is_not_judged() -> None:
    assert judge([uneven(0.01, rows=4)], sensitivity=TRIED).same


def test_axis_of_varying_size_has_no_features() -> None:
    """Rows of a batch are no features: only the columns have one size in cases of 8 and of 5 rows."""
    rows = [replace(uneven(0.01), name="first"), uneven(0.01, rows=5, name="second")]
    turned = [
        replace(
            case,
            **{s: {"y": getattr(case, s)["y"].T} for s in ("reference", "deployed", "candidate", "base", "scaled")},
        )
        for case in rows
    ]
    assert "along axis 0" in str(judge(turned, sensitivity=TRIED))
    assert "along axis 1" not in str(judge(turned, sensitivity=TRIED))


def test_size_of_each_feature_is_its_rms_over_all_cases() -> None:
    first = np.array([[3.0, 0.0, 3e200, 1.0], [3.0, 0.0, 0.0, np.inf]])  # (values, features)
    second = np.array([[-3.0, 0.0, 4e200, 1.0]])
    cases = [replace(make(own=x, error=x, effect=x), reference={"y": x}) for x in (first, second)]
    sizes = small_features._rms_by_feature(cases, 1, lambda case: case.reference["y"])
    np.testing.assert_allclose(sizes, [3.0, 0.0, 5e200 / 3**0.5, np.inf], rtol=1e-15)
