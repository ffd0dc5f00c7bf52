"""What may have happened to a weight that differs from its sum."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_export.plan import Layout, Step, Term
from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight
from lora_export.verification.against_checkpoint.explain_difference import explain_difference
from lora_export.verification.against_checkpoint.fp64_sums import Fp64Sum
from support.plans import matrix, pair, square, vector
from support.stored_tensors import stored

RNG = np.random.default_rng(0)
W = RNG.normal(size=(40, 30))
ONE = pair(RNG.normal(size=(2, 30)), RNG.normal(size=(40, 2)))
TWO = pair(RNG.normal(size=(2, 30)), RNG.normal(size=(40, 2)))
FIRST, SECOND = (one.b @ one.a for one in (ONE, TWO))
BOTH = Step(matrix("fc.weight", 40, 30), (Term("one", "fc", ONE), Term("two", "fc", TWO)))
DETECTED: Mapping[str, bool] = MappingProxyType({"one left out": True, "one x 1.1": True})


def explained(
    folder: Path, values: Any, *, base: Any = W, step: Step = BOTH, detected: Mapping[str, bool] = DETECTED,
    is_local: bool = False, dtype: Any = np.float32,
) -> str:  # fmt: skip
    pieces = [slice(0, 1), slice(1, len(np.asarray(base)))]
    weight = ChangedWeight(step, stored(folder / "b", base, dtype), stored(folder / "c", values, dtype), pieces)
    return explain_difference(weight, Fp64Sum.right(step), detected, is_local=is_local)


def test_a_wrong_sum_that_was_not_detected_is_the_explanation(tmp_path: Path) -> None:
    detected = {"one left out": True, "two x 1.1": False}
    assert explained(tmp_path, W + FIRST + 1.1 * SECOND, detected=detected) == "it is the sum with two x 1.1"


def test_scales_are_fitted_for_each_adapter(tmp_path: Path) -> None:
    assert explained(tmp_path, W + 2 * FIRST + SECOND) == "its scale is off: one x 2"
    assert explained(tmp_path, W - FIRST + 0.25 * SECOND) == "its scale is off: one x -1, two x 0.25"
    shift = Step(vector("fc.bias", 3), shift=np.float32([1, 2, 3]))
    assert explained(tmp_path, [3, 6, 9], base=[0, 0, 0], step=shift) == "its scale is off: the bias's change x 3"


def test_what_no_scale_explains_is_not_explained(tmp_path: Path) -> None:
    assert explained(tmp_path, W + FIRST[::-1] + SECOND) == ""
    assert explained(tmp_path, W) == "", "it is the base itself: there is no difference to fit"


def test_a_few_entries_are_damaged(tmp_path: Path) -> None:
    values = W + FIRST + SECOND
    values[3, 4] += 1
    assert explained(tmp_path, values, is_local=True) == "a few entries are damaged"


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    values = W + FIRST + SECOND
    values[:, 0] = np.inf
    assert explained(tmp_path, values) == "some are not finite"


def test_a_change_that_was_rounded_first_is_recognised(tmp_path: Path) -> None:
    bf16 = ml_dtypes.bfloat16
    base = W.astype(bf16)
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
