"""A changed weight, entry by entry against its sum, and against sums that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.plan import Layout, Step, Term
from lora_export.verification.against_checkpoint import changed_weight, stored_tensor
from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight
from lora_export.verification.against_checkpoint.fp64_sums import Fp64Sum
from lora_export.verification.against_checkpoint.judge_changed import (
    explain_difference,
    judge_changed,
    judge_unknown_layout,
)
from lora_export.verification.against_checkpoint.result import AuditedWeight, Fate
from lora_export.verification.parity import Outcome
from support.plans import matrix, pair, square, vector
from support.stored_tensors import stored

W = np.float64([[100, 200, 300], [400, 500, 600]])
CHANGE = np.float64([[1, 2, 3], [10, 20, 30]])
STEP = Step(matrix("fc.weight"), (Term("ad", "fc", pair()),))
SQUARE = Step(matrix("fc.weight", 2, 2, layout=Layout.UNKNOWN), (Term("ad", "fc", square()),))
SQUARE_CHANGE = np.float64([[1, 2], [10, 20]])


@pytest.fixture(autouse=True, params=[(1, 1), (1 << 22, 1), (1 << 22, 1 << 16)], ids=["pieces", "blocks", "whole"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time read, or compared; or all."""
    piece, block = request.param
    monkeypatch.setattr(stored_tensor, "PIECE_BYTES", piece)
    monkeypatch.setattr(changed_weight, "FIRST_ENTRIES", block)
    monkeypatch.setattr(changed_weight, "MOST_ENTRIES", block)


def judged(
    folder: Path, values: NDArray[Any], *, weight: Any = W, step: Step = STEP, dtype: Any = np.float32
) -> AuditedWeight:
    base, candidate = stored(folder / "b", weight, dtype), stored(folder / "c", values, dtype)

    def judge(one: Step) -> AuditedWeight:
        return judge_changed("fc.weight", one, base, candidate)

    return judge_unknown_layout(step, judge) if step.spec.layout is Layout.UNKNOWN else judge(step)


def test_the_sum_is_the_same_and_its_figures_are_measured(tmp_path: Path) -> None:
    found = judged(tmp_path, W + CHANGE)
    assert (found.fate, found.outcome, found.elements, found.off) == (Fate.CHANGED, Outcome.SAME, 6, 0)
    assert found.controls == {"ad left out": True, "ad x 1.1": True}
    assert found.relative_change == pytest.approx(np.linalg.norm(CHANGE) / np.linalg.norm(W))
    assert (found.retention, found.noise, found.error) == (1.0, 0.0, 0.0)


def test_the_worst_entry_is_named_with_its_place_in_the_tensor(tmp_path: Path) -> None:
    values = W + CHANGE
    values[1, 2] += 0.5
    found = judged(tmp_path, values)
    assert (found.outcome, found.off) == (Outcome.DIFFERENT, 1)
    assert found.worst is not None
    assert (found.worst.index, found.worst.candidate, found.worst.reference) == ((1, 2), 630.5, 630.0)
    assert found.why.startswith("1 of 6 entries are not W + s·BA, by up to ") and found.error > 1000


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_off(tmp_path: Path, value: float) -> None:
    values = W + CHANGE
    values[0, 0] = value
    found = judged(tmp_path, values)
    assert (found.outcome, found.off, found.error) == (Outcome.DIFFERENT, 1, np.inf)
    assert found.worst is not None and found.worst.index == (0, 0)


@pytest.mark.parametrize(("factor", "reason"), [(0, "ad left out"), (1.1, "ad x 1.1"), (3, "its scale is off: ad x 3")])
def test_a_wrong_scale_is_different_and_explained(tmp_path: Path, factor: float, reason: str) -> None:
    found = judged(tmp_path, W + factor * CHANGE)
    assert found.outcome is Outcome.DIFFERENT and reason in found.why


def test_a_change_below_rounding_is_undecided(tmp_path: Path) -> None:
    found = judged(tmp_path, W * 1000, weight=W * 1000, dtype=ml_dtypes.bfloat16)
    assert found.outcome is Outcome.UNDECIDED
    assert found.why == "it also fits the sum with ad left out and ad x 1.1: rounding to bfloat16 hides the difference"


def test_a_control_that_changes_nothing_is_not_required(tmp_path: Path) -> None:
    nothing = Step(matrix("fc.weight"), (Term("ad", "fc", pair(b=[[0], [0]])),))
    found = judged(tmp_path, W, step=nothing)
    assert (found.outcome, found.controls) == (Outcome.SAME, {})


@pytest.mark.parametrize("transposed", [False, True])
def test_a_sum_of_unknown_layout_is_undecided(tmp_path: Path, transposed: bool) -> None:
    found = judged(tmp_path, SQUARE_CHANGE.T if transposed else SQUARE_CHANGE, weight=np.zeros((2, 2)), step=SQUARE)
    assert found.outcome is Outcome.UNDECIDED
    stated = "in_out" if transposed else "out_in"
    assert found.why.startswith(f"its layout is unknown: it is the sum for a weight stored {stated}. State the layout")


def test_a_symmetric_sum_of_unknown_layout_is_the_same(tmp_path: Path) -> None:
    symmetric = Step(SQUARE.spec, (Term("ad", "fc", pair([[1, 2]], [[1], [2]])),))
    found = judged(tmp_path, np.float64([[1, 2], [2, 4]]), weight=np.zeros((2, 2)), step=symmetric)
    assert found.outcome is Outcome.SAME


def test_a_sum_of_neither_layout_is_different(tmp_path: Path) -> None:
    found = judged(tmp_path, 5 * SQUARE_CHANGE, weight=np.zeros((2, 2)), step=SQUARE)
    assert found.outcome is Outcome.DIFFERENT
    assert found.why.endswith("(its layout is unknown: it is not the sum of either layout)")


# --- explain difference ---

RNG = np.random.default_rng(0)
OTHER = RNG.normal(size=(40, 30))
ONE = pair(RNG.normal(size=(2, 30)), RNG.normal(size=(40, 2)))
TWO = pair(RNG.normal(size=(2, 30)), RNG.normal(size=(40, 2)))
FIRST, SECOND = (one.b @ one.a for one in (ONE, TWO))
BOTH = Step(matrix("fc.weight", 40, 30), (Term("one", "fc", ONE), Term("two", "fc", TWO)))
DETECTED: Mapping[str, bool] = MappingProxyType({"one left out": True, "one x 1.1": True})


def explained(
    folder: Path, values: Any, *, base: Any = OTHER, step: Step = BOTH, detected: Mapping[str, bool] = DETECTED,
    is_local: bool = False, dtype: Any = np.float32,
) -> str:  # fmt: skip
    pieces = [slice(0, 1), slice(1, len(np.asarray(base)))]
    weight = ChangedWeight(step, stored(folder / "b", base, dtype), stored(folder / "c", values, dtype), pieces)
    return explain_difference(weight, Fp64Sum.right(step), detected, is_local=is_local)


def test_a_wrong_sum_that_was_not_detected_is_the_explanation(tmp_path: Path) -> None:
    detected = {"one left out": True, "two x 1.1": False}
    assert explained(tmp_path, OTHER + FIRST + 1.1 * SECOND, detected=detected) == "it is the sum with two x 1.1"


def test_scales_are_fitted_for_each_adapter(tmp_path: Path) -> None:
    assert explained(tmp_path, OTHER + 2 * FIRST + SECOND) == "its scale is off: one x 2"
    assert explained(tmp_path, OTHER - FIRST + 0.25 * SECOND) == "its scale is off: one x -1, two x 0.25"
    shift = Step(vector("fc.bias", 3), shift=np.float32([1, 2, 3]))
    assert explained(tmp_path, [3, 6, 9], base=[0, 0, 0], step=shift) == "its scale is off: the bias's change x 3"


def test_what_no_scale_explains_is_not_explained(tmp_path: Path) -> None:
    assert explained(tmp_path, OTHER + FIRST[::-1] + SECOND) == ""
    assert explained(tmp_path, OTHER) == "", "it is the base itself: there is no difference to fit"


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    values = OTHER + FIRST + SECOND
    values[:, 0] = np.inf
    assert explained(tmp_path, values) == "some are not finite"


def test_a_change_that_was_rounded_first_is_recognised(tmp_path: Path) -> None:
    bf16 = ml_dtypes.bfloat16
    base = OTHER.astype(bf16)
    change = (FIRST + SECOND).astype(bf16).astype(np.float64)
    values = (base.astype(np.float64) + change).astype(bf16)
    assert explained(tmp_path, values, base=base, dtype=bf16) == (
        "the change seems to have been rounded before it was added"
    )
    values[0] = base[0]  # the rows of the first piece differ for another reason
    assert "rounded" not in explained(tmp_path, values, base=base, dtype=bf16)


@pytest.mark.parametrize(("layout", "other"), [(Layout.OUT_IN, "in_out"), (Layout.IN_OUT, "out_in")])
def test_a_matrix_read_in_the_other_layout_is_recognised(tmp_path: Path, layout: Layout, other: str) -> None:
    step = Step(matrix("fc.weight", 2, 2, layout=layout), (Term("ad", "fc", square()),))
    change = np.float64([[1, 2], [10, 20]])
    values = change.T if layout is Layout.OUT_IN else change
    assert explained(tmp_path, values, base=np.zeros((2, 2)), step=step) == (
        f"it is the sum with BA transposed, that of a weight stored {other}; this one is stored {layout}"
    )
