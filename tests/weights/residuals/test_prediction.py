"""Rows of the base from merged rows: right but for roundings, and nothing unknown is subtracted."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from lora_export.lora import EVERY_ROW, LoraPair
from lora_export.plan import Layout, Plan, Step, TensorSpec, Term
from lora_export.plan.stored_region import StoredRegion
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.residuals import prediction
from lora_export.weights.residuals.prediction import ChangedTensor, Predictor, changed_tensor
from support.handmade import rounded_sum

RNG = np.random.default_rng(8)
PAIR = LoraPair(RNG.normal(size=(2, 30)) / 50, RNG.normal(size=(40, 2)), 1.0)
SPEC = TensorSpec("w", (40, 30), "float32", Layout.OUT_IN)
STEP = Step(SPEC, (Term("a", "w", PAIR),))


def entry(dtype: object, shape: tuple[int, ...] = (40, 30)) -> Entry:
    return Entry("w", np.dtype(dtype), shape, 0, int(np.prod(shape)) * np.dtype(dtype).itemsize)  # type: ignore[call-overload]


def tensor(dtype: object, merged: object, *steps: tuple[Step, slice, slice]) -> ChangedTensor:
    return ChangedTensor(entry(dtype), entry(merged), steps, 40)


WHOLE = (STEP, slice(0, 40), EVERY_ROW)


@pytest.mark.parametrize(
    ("dtype", "merged"),
    [
        (np.float32, np.float32),
        (np.float16, np.float16),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, np.float32),
        (np.float64, np.float64),
    ],
)
def test_most_entries_are_predicted(dtype: type, merged: type) -> None:
    base = RNG.normal(size=(40, 30)).astype(dtype)
    stored = rounded_sum(base, PAIR.delta(), merged)
    found = Predictor(tensor(dtype, merged, WHOLE)).rows(slice(0, 40), stored)
    assert found.dtype == base.dtype
    assert (found == base).mean() > 0.75 or np.abs(found - base).max() < 1e-7
    assert (stored.astype(dtype) == base).mean() < 0.3


def test_parts_of_a_tensor_are_subtracted_where_they_are() -> None:
    small = Step(replace(SPEC, shape=(4, 3)), (Term("a", "w", LoraPair(np.ones((1, 3)), np.ones((4, 1)), 1.0)),))
    changed = tensor(np.float32, np.float32, (small, slice(8, 12), slice(0, 6, 2)))
    merged = np.zeros((10, 30), np.float32)
    found = Predictor(changed).rows(slice(0, 10), merged)
    expected = np.zeros((10, 30))
    expected[8:, 0:6:2] = -1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "step",
    [
        replace(STEP, replace=np.ones((40, 30), np.float32)),
        replace(STEP, terms=(Term("a", "w", replace(PAIR, magnitude=np.ones(40, np.float32))),)),
        Step(SPEC, replace=np.ones((40, 30), np.float32)),
    ],
)
def test_what_is_unknown_is_not_subtracted(step: Step) -> None:
    changed = tensor(np.float32, np.float32, (step, slice(0, 40), EVERY_ROW))
    merged = RNG.normal(size=(40, 30)).astype(np.float32)
    np.testing.assert_array_equal(Predictor(changed).rows(slice(0, 40), merged), merged)


def test_integers_are_predicted_as_they_are_or_as_zero() -> None:
    merged = np.full((40, 30), 3, np.int32)
    assert (Predictor(tensor(np.int32, np.int32)).rows(slice(0, 40), merged) == 3).all()
    assert not Predictor(tensor(np.int64, np.int32)).rows(slice(0, 40), merged).any()


def test_a_plan_tells_which_tensors_change() -> None:
    plan = Plan((), (), (STEP,), ())
    changed = changed_tensor(plan, entry(np.float32), entry(np.float32))
    assert changed is not None and (changed.shape, changed.steps[0][0]) == ((40, 30), STEP)
    other = replace(entry(np.float32), name="other")
    assert changed_tensor(plan, other, other) is None
    rounded = changed_tensor(plan, other, replace(entry(np.float16), name="other"))
    assert rounded is not None and rounded.steps == ()
    region = StoredRegion("fused", (80, 15), slice(0, 40))
    part = replace(STEP, spec=replace(SPEC, name="part", region=region))
    fused = replace(entry(np.float32), name="fused")
    cut = changed_tensor(Plan((), (), (part,), ()), fused, fused)
    assert cut is not None and cut.shape == (80, 15)


def test_blocks_are_whole_rows_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "ENTRIES_AT_ONCE", 500)
    pieces = list(tensor(np.float32, np.float32).pieces())
    assert pieces[:2] == [slice(0, 16), slice(16, 32)] and pieces[-1] == slice(32, 40)
    empty = ChangedTensor(entry(np.float32, (0, 3)), entry(np.float32, (0, 3)), (), 0)
    assert (list(empty.pieces()), empty.shape) == ([], (0, 0))
