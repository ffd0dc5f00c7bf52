"""W + s·BA in fp64 by hand, the bound of a sum in fp32, and sums that are wrong on purpose."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_export import sums
from lora_export.lora import LoraPair
from lora_export.plan import Layout, Step, Term
from lora_export.verification.against_checkpoint.fp64_sums import (
    EVERY_ENTRY,
    Fp64Sum,
    allowed_error,
    half_step,
    sum_in_other_layout,
    wrong_sums,
)
from lora_export.verification.against_checkpoint.stored_tensor import Scratch
from support.plans import BA, matrix, pair, square, table, vector

W = np.float64([[100, 200, 300], [400, 500, 600]])
ALL = slice(0, 2)


def a_step(*pairs: LoraPair, strength: float = 1.0, layout: Layout = Layout.OUT_IN, **fields: Any) -> Step:
    """A step of these pairs on a (2, 3) weight, or on its transpose."""
    rows, columns = (3, 2) if layout.is_transposed else (2, 3)
    terms = tuple(Term(f"ad{number}", "fc", each, strength) for number, each in enumerate(pairs))
    return Step(matrix("fc.weight", rows, columns, layout=layout), terms=terms, **fields)


def dora(magnitude: list[float]) -> LoraPair:
    """With W = 0: ΔW = [[3, 0, 4], [0, 0, 5]] whose rows have the length 5, and columns 3, 0 and √41."""
    return LoraPair(a=np.eye(3)[[0, 2]], b=np.array([[3, 4], [0, 5]]), scale=1.0, magnitude=np.array(magnitude))


def test_a_sum_is_w_and_every_term_at_its_strength() -> None:
    value, _ = Fp64Sum.right(a_step(pair(scale=0.5), pair(), strength=4.0)).rows(ALL, W)
    assert value.tolist() == (W + 6 * np.array(BA)).tolist()
    one_row, _ = Fp64Sum.right(a_step(pair())).rows(slice(1, 2), W[1:])
    assert one_row.tolist() == [[410, 520, 630]]


def test_a_weight_stored_in_out_gets_the_transposed_change() -> None:
    value, _ = Fp64Sum.right(a_step(pair(), layout=Layout.IN_OUT)).rows(slice(1, 3), W.T[1:])
    assert value.tolist() == [[202, 520], [303, 630]]
    embedding, _ = Fp64Sum.right(a_step(table(), layout=Layout.EMBEDDING)).rows(slice(0, 3), W.T)
    assert embedding.tolist() == (W + BA).T.tolist()


def test_a_kernel_keeps_its_shape() -> None:
    kernel = LoraPair(a=np.arange(6).reshape(1, 3, 2), b=np.array([[[1]], [[10]]]), scale=1.0)
    step = Step(matrix("conv.weight"), terms=(Term("ad", "conv", kernel),))
    value, bound = Fp64Sum.right(step).rows(ALL, np.zeros((2, 3, 2)))
    assert value[1].tolist() == [[0, 10], [20, 30], [40, 50]] and bound.shape == (2, 3, 2)


def test_a_bias_is_shifted() -> None:
    step = Step(vector("fc.bias"), shift=np.float32([1, 2]))
    assert Fp64Sum.right(step).rows(ALL, np.float64([10, 20]))[0].tolist() == [11, 22]
    assert Fp64Sum(step, (0.5,)).rows(slice(1, 2), np.float64([20]))[0].tolist() == [21]


def test_dora_gives_each_output_its_length() -> None:
    value, _ = Fp64Sum.right(a_step(dora([10, 15]))).rows(ALL, np.zeros((2, 3)))
    assert value.tolist() == [[6, 0, 8], [0, 0, 15]]
    second, _ = Fp64Sum.right(a_step(dora([10, 15]))).rows(slice(1, 2), np.zeros((1, 3)))
    assert second.tolist() == [[0, 0, 15]]
    plain, _ = Fp64Sum.right(a_step(dora([10, 15]))).without_magnitude().rows(ALL, np.zeros((2, 3)))
    assert plain.tolist() == [[3, 0, 4], [0, 0, 5]]


def test_dora_on_columns_needs_their_norms_of_all_rows() -> None:
    step = a_step(dora([10, 15]), layout=Layout.IN_OUT)
    one = Fp64Sum.right(step)
    assert one.needs_column_norms and not one.without_magnitude().needs_column_norms
    assert not Fp64Sum.right(a_step(dora([10, 15]))).needs_column_norms
    known = Fp64Sum(step, (1.0,), column_norms=(np.float64([5, 5]), np.zeros(2)))
    value, _ = known.rows(slice(2, 3), np.zeros((1, 2)))
    assert value.tolist() == [[8, 15]]


def test_the_bound_covers_a_sum_in_fp32_and_is_narrow() -> None:
    rng = np.random.default_rng(0)
    big = LoraPair(a=rng.normal(size=(8, 300)), b=rng.normal(size=(200, 8)), scale=0.7)
    step = Step(matrix("fc.weight", 200, 300), terms=(Term("ad", "fc", big),))
    weight = np.float32(rng.normal(size=(200, 300)))
    value, bound = Fp64Sum.right(step).rows(slice(0, 200), weight.astype(np.float64))
    in_fp32 = weight + sums.delta(step)
    assert np.abs(in_fp32 - value).max() > 0 and (np.abs(in_fp32 - value) <= bound).all()
    assert bound.max() < 1e-4 * np.abs(value).max()


def test_controls_leave_out_scale_and_transpose_each_term() -> None:
    step = Step(matrix("fc.weight", 2, 2), terms=(Term("one", "fc", square()), Term("two", "fc", square())))
    wrong = dict(wrong_sums(Fp64Sum.right(step)))
    assert list(wrong) == [f"{name} {what}" for name in ("one", "two") for what in ("left out", "x 1.1", "transposed")]
    changes = {name: one.rows(ALL, np.zeros((2, 2)))[0] for name, one in wrong.items()}
    change = np.float64([[1, 2], [10, 20]])  # of one term
    assert changes["one left out"].tolist() == change.tolist()
    assert changes["two x 1.1"] == pytest.approx(2.1 * change)
    assert changes["two transposed"].tolist() == (change + change.T).tolist()
    assert list(dict(wrong_sums(Fp64Sum.right(a_step(pair()))))) == ["ad0 left out", "ad0 x 1.1"]  # not square
    shift = Step(vector("fc.bias"), shift=np.float32([1, 2]))
    assert list(dict(wrong_sums(Fp64Sum.right(shift)))) == ["the bias's change left out", "the bias's change x 1.1"]


def test_only_a_square_matrix_has_a_sum_in_the_other_layout() -> None:
    step = Step(matrix("fc.weight", 2, 2), terms=(Term("ad", "fc", square()),))
    other = sum_in_other_layout(Fp64Sum.right(step))
    assert other is not None and other.rows(ALL, np.zeros((2, 2)))[0].tolist() == [[1, 10], [2, 20]]
    assert sum_in_other_layout(Fp64Sum.right(a_step(pair()))) is None
    embedding = Step(matrix("emb.weight", 2, 2, layout=Layout.EMBEDDING), terms=(Term("ad", "emb", square()),))
    assert sum_in_other_layout(Fp64Sum.right(embedding)) is None


@pytest.mark.parametrize(
    ("value", "dtype", "half"),
    [(1.0, np.float32, 2**-24), (1.5, ml_dtypes.bfloat16, 2**-8), (2.0, np.float16, 2**-10), (0.0, np.float16, 2**-25)],
)
def test_half_a_step_is_half_the_distance_to_the_next_number(value: float, dtype: Any, half: float) -> None:
    assert half_step(np.float64([value]), np.dtype(dtype)).tolist() == [half]


def test_an_allowed_error_is_half_a_step_and_the_bound() -> None:
    allowed = allowed_error(np.float64([-1.5]), np.float64([0.25]), np.dtype(ml_dtypes.bfloat16))
    assert allowed.tolist() == [2**-8 + 0.25]


@pytest.mark.parametrize("layout", [Layout.OUT_IN, Layout.IN_OUT])
@pytest.mark.parametrize("magnitude", [None, [10, 15]])
def test_the_bound_of_some_entries_is_that_of_every_entry(layout: Layout, magnitude: list[float] | None) -> None:
    rng = np.random.default_rng(0)
    one = LoraPair(a=rng.normal(size=(2, 3)), b=rng.normal(size=(2, 2)), scale=0.7, magnitude=magnitude)
    terms = (one,) if magnitude else (one, pair(scale=0.5))
    known = (np.float64([5, 6]), np.float64([1e-7, 2e-7])) if magnitude and layout.is_transposed else None
    weight = W.T if layout.is_transposed else W
    right = Fp64Sum(a_step(*terms, layout=layout), (1.0,) * len(terms), column_norms=known)
    _, bound_of = right.values(slice(0, len(weight)), weight, Scratch())
    every = bound_of(EVERY_ENTRY)
    assert every.shape == (6,) and (every > 0).all() and len(set(every)) == 6
    assert bound_of(np.array([4, 1])).tolist() == every[[4, 1]].tolist()
