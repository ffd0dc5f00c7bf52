"""Where a merge sums, on matrices that a person can add: precision, rounding, row norms and DoRA."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.lora import EVERY_ROW, LoraPair
from lora_export.plan import Layout, Step, TensorSpec, Term
from support.handmade import rounded_sum

# --- Rounding ---


def test_the_sum_is_rounded_once_and_ties_go_to_even():
    # Between 256 and 512 bf16 has every second number: 257 is a tie, and goes to 256; 259 to 260.
    weight = np.array([256, 256, 256], ml_dtypes.bfloat16)
    total = rounded_sum(weight, np.array([1, 3, 1.001], np.float32))
    assert total.dtype == ml_dtypes.bfloat16
    assert total.astype(float).tolist() == [256, 260, 258]


def test_a_half_precision_weight_is_summed_in_fp32():
    # In fp16 alone 2048 + 1 is 2048; in fp32 it is 2049.
    assert rounded_sum(np.array([2048], np.float16), np.array([1], np.float32), np.float32).tolist() == [2049]


def test_an_fp64_weight_is_summed_in_fp64():
    assert rounded_sum(np.array([1.0]), np.array([2**-40], np.float32)).tolist() == [1 + 2**-40]


def test_fp64_goes_to_bf16_as_in_pytorch():
    """By way of fp32, with every version of ml_dtypes: 0.7 rounds once."""
    values = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40, 1e39, -3.0])
    found = np.empty(4, ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):
        sums.round_into(found, values)
    assert found.astype(np.float64).tolist() == torch.tensor(values).to(torch.bfloat16).tolist()


def test_a_sum_leaves_the_weight_unchanged():
    weight = np.array([1], np.float32)
    assert rounded_sum(weight, np.array([2], np.float32)).tolist() == [3]
    assert weight.tolist() == [1]


# --- Norms ---


def test_squared_norms_are_summed_in_fp64_over_all_inputs():
    weight = np.full((2, 3, 4), 1e25, np.float32)  # whose squares fp32 cannot hold
    np.testing.assert_allclose(sums.squared_norms(weight), [12e50] * 2, rtol=1e-6)
    assert sums.squared_norms(np.array([[3, 4], [5, 12]], np.float32).T).tolist() == [34, 160]


@pytest.mark.parametrize("layout", [Layout.OUT_IN, Layout.IN_OUT])
def test_squared_row_norms_are_those_of_the_stored_rows(layout, monkeypatch):
    monkeypatch.setattr(sums, "ROWS_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    pairs = [LoraPair(a=rng.standard_normal((r, 5)), b=rng.standard_normal((4, r)), scale=0.5) for r in (2, 3)]
    terms = tuple(Term("a", "fc", pair, strength) for pair, strength in zip(pairs, (1.0, -3.0), strict=True))
    step = Step(TensorSpec("fc.weight", (4, 5) if layout is Layout.OUT_IN else (5, 4), "float32", layout), terms)
    stored = sums.stored_delta(step, EVERY_ROW)
    assert stored.shape == step.spec.shape
    np.testing.assert_allclose(sums.squared_row_norms(step), (stored.astype(np.float64) ** 2).sum(axis=1), rtol=1e-5)
    shifted = Step(step.spec, shift=np.array([1, -2], np.float32))
    assert sums.squared_row_norms(shifted).tolist() == [1, 4]


# --- DoRA ---


def dora_step(layout: Layout = Layout.OUT_IN) -> Step:
    """2 * BA = [[2, 4, 0], [0, 0, 0]], and outputs of lengths 10 and 20."""
    pair = LoraPair(a=np.array([[1, 2, 0]]), b=np.array([[1], [0]]), scale=1.0, magnitude=np.array([10, 20]))
    shape = (3, 2) if layout.is_transposed else (2, 3)
    return Step(TensorSpec("fc.weight", shape, "float32", layout), (Term("mine", "fc", pair, 2.0),))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dora_gives_each_output_its_length(dtype):
    # W + 2 * BA = [[3, 4, 0], [0, 0, 5]], whose rows are 5 long.
    weight = np.array([[1, 0, 0], [0, 0, 5]], dtype)
    total, change = sums.summed(dora_step(), weight)
    assert total.tolist() == [[6, 8, 0], [0, 0, 20]]
    assert change.tolist() == [[5, 8, 0], [0, 0, 15]]
    assert total.dtype == dtype and weight.tolist() == [[1, 0, 0], [0, 0, 5]]


@pytest.mark.parametrize("layout", [Layout.OUT_IN, Layout.IN_OUT])
def test_dora_on_some_stored_rows_gives_those_rows_of_the_whole(layout):
    weight = np.array([[1, 0, 0], [0, 0, 5]], np.float32)
    stored = weight.T if layout.is_transposed else weight
    expected = np.array([[6, 8, 0], [0, 0, 20]]).T if layout.is_transposed else np.array([[6, 8, 0], [0, 0, 20]])
    column_norms = np.array([25.0, 25.0]) if layout.is_transposed else None
    total = np.empty(stored[1:].shape, np.float32)
    change = sums.sum_rows(dora_step(layout), slice(1, None), stored[1:], total, column_norms=column_norms)
    assert total.tolist() == expected[1:].tolist()
    assert change.tolist() == (expected - stored)[1:].tolist()


def test_dora_on_a_zero_output_is_refused():
    with pytest.raises(InputRefused, match=r"^fc\.weight: 2 outputs of W \+ s·BA are zero, and DoRA cannot rescale"):
        sums.summed(dora_step(), np.array([[-2, -4, 0], [0, 0, 0]], np.float32))
