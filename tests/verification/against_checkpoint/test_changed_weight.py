"""Entries that are decided by their bits are decided as all entries are in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lora_export import sums
from lora_export.lora import LoraPair
from lora_export.plan import Layout, Step, Term
from lora_export.verification.against_checkpoint import changed_weight as module
from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight, WeightRows, compare_rows
from lora_export.verification.against_checkpoint.fp64_sums import Fp64Sum
from lora_export.verification.against_checkpoint.stored_tensor import Scratch
from support.plans import matrix, pair
from support.stored_tensors import stored

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]
ROWS, COLUMNS = 64, 96


def a_step(rng: np.random.Generator, *, layout: Layout = Layout.OUT_IN, terms: int = 1, dora: bool = False) -> Step:
    out, in_ = (COLUMNS, ROWS) if layout.is_transposed else (ROWS, COLUMNS)

    def pair() -> LoraPair:
        a, b = rng.normal(size=(8, in_)), 0.001 * rng.normal(size=(out, 8))
        return LoraPair(a=a, b=b, scale=0.7, magnitude=rng.uniform(0.5, 2, out) if dora else None)

    return Step(
        matrix("fc.weight", ROWS, COLUMNS, layout=layout), tuple(Term(f"ad{n}", "fc", pair()) for n in range(terms))
    )


def merged(step: Step, weight: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """What a merge stores: the sum of its own code, in fp32, rounded once."""
    view = weight.T if step.spec.layout.is_transposed else weight
    total, _ = sums.summed(step, view)
    return np.ascontiguousarray(total.T if step.spec.layout.is_transposed else total).astype(dtype)


def a_block(weight: NDArray[Any], stored: NDArray[Any]) -> WeightRows:
    return WeightRows(slice(0, len(weight)), weight.astype(np.float64), stored.astype(np.float64), stored)


def compared(block: WeightRows, one: Fp64Sum, *, every_entry: bool) -> tuple[int, float, int]:
    found = compare_rows(block, one, Scratch(), every_entry=every_entry)
    count = block.stored.size if isinstance(found.entries, slice) else found.entries.size
    return found.off, float(found.relative.max(initial=0.0)), count


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    std=st.sampled_from([1e-3, 0.02, 1.0, 30.0]),
    layout=st.sampled_from([Layout.OUT_IN, Layout.IN_OUT]),
    terms=st.integers(1, 2),
    steps=st.integers(-3, 3),
)
def test_bits_decide_as_every_entry_in_fp64_does(
    seed: int, dtype: Any, std: float, layout: Layout, terms: int, steps: int
) -> None:
    """Some entries are moved by a few steps of the stored dtype: less than what is allowed in fp32, more in bf16."""
    rng = np.random.default_rng(seed)
    step = a_step(rng, layout=layout, terms=terms)
    weight = (std * rng.normal(size=(ROWS, COLUMNS))).astype(dtype)
    stored = merged(step, weight, dtype)
    moved = rng.random(stored.shape) < 0.02
    stored.view(f"i{stored.dtype.itemsize}")[moved] += steps
    for one in (Fp64Sum.right(step), Fp64Sum(step, (1.1, *[1.0] * (terms - 1)))):
        by_bits, every = (compared(a_block(weight, stored), one, every_entry=each) for each in (False, True))
        assert by_bits[0] == every[0]
        assert by_bits[1] == pytest.approx(every[1]) if every[0] else by_bits[1] <= every[1] * (1 + 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True])
def test_few_entries_of_a_merge_need_the_second_look(dtype: Any, dora: bool) -> None:
    rng = np.random.default_rng(0)
    step = a_step(rng, dora=dora)
    weight = (0.02 * rng.normal(size=(ROWS, COLUMNS))).astype(dtype)
    block = a_block(weight, merged(step, weight, dtype))
    off, worst, count = compared(block, Fp64Sum.right(step), every_entry=False)
    assert off == 0 and worst <= 1 and count <= 0.02 * weight.size


def test_an_entry_that_is_off_is_found_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    step, weight = a_step(rng), (0.02 * rng.normal(size=(ROWS, COLUMNS))).astype(ml_dtypes.bfloat16)
    stored = merged(step, weight, weight.dtype)
    stored[17, 5] *= 2
    found = compare_rows(a_block(weight, stored), Fp64Sum.right(step), Scratch())
    assert not isinstance(found.entries, slice)
    assert found.off == 1 and found.entries[found.relative.argmax()] == 17 * COLUMNS + 5
    monkeypatch.setattr(module, "MOST_UNDECIDED", 0)
    assert isinstance(compare_rows(a_block(weight, stored), Fp64Sum.right(step), Scratch()).entries, slice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_off_though_their_bits_agree(dtype: Any, value: float) -> None:
    """An infinity in base and candidate has the bits of its sum."""
    rng = np.random.default_rng(0)
    step, weight = a_step(rng), (0.02 * rng.normal(size=(ROWS, COLUMNS))).astype(dtype)
    weight[3, 4] = value
    stored = merged(step, weight, dtype)
    stored[3, 4] = value
    assert compared(a_block(weight, stored), Fp64Sum.right(step), every_entry=False)[::2] == (1, weight.size)


def test_a_sum_that_overflows_the_dtype_is_off() -> None:
    rng = np.random.default_rng(0)
    step, weight = a_step(rng), np.zeros((ROWS, COLUMNS), np.float16)
    weight[0, 0] = 65504
    pair = LoraPair(a=np.ones((1, COLUMNS)), b=np.full((ROWS, 1), 60000.0), scale=1.0)
    step = Step(step.spec, (Term("ad", "fc", pair),))
    with np.errstate(over="ignore"):
        stored = merged(step, weight, np.float16)
    assert np.isinf(stored[0, 0])
    assert compared(a_block(weight, stored), Fp64Sum.right(step), every_entry=False)[0] == 1


# --- changed weight ---

W = [[1, 2, 3], [4, 5, 6]]


def test_both_sides_are_read_in_fp64(tmp_path: Path) -> None:
    base, candidate = stored(tmp_path / "b", W), stored(tmp_path / "c", W, ml_dtypes.bfloat16)
    weight = ChangedWeight(Step(matrix("fc.weight"), (Term("ad", "fc", pair()),)), base, candidate, [slice(0, 2)])
    for rows in (weight.before(slice(1, 2)), weight.after(slice(1, 2))):
        assert rows.dtype == np.float64 and rows.tolist() == [[4, 5, 6]]


def test_a_whole_tensor_of_the_adapter_is_what_is_added_to(tmp_path: Path) -> None:
    whole = np.full((2, 3), 7, np.float16)
    step = Step(matrix("fc.weight"), (Term("ad", "fc", pair()),), replace=whole)
    weight = ChangedWeight(step, stored(tmp_path / "b", W), stored(tmp_path / "c", W), [slice(0, 2)])
    assert weight.before(slice(0, 1)).tolist() == [[7, 7, 7]]


def test_column_norms_are_summed_over_the_pieces(tmp_path: Path) -> None:
    # Stored (in, out): W + ΔW = [[3, 0], [4, 0], [0, 2]], whose columns have the lengths 5 and 2.
    scaled = LoraPair(a=np.eye(3)[[0, 1]], b=np.array([[3, 4], [0, 0]]), scale=1.0, magnitude=np.array([1, 1]))
    step = Step(matrix("fc.weight", 3, 2, layout=Layout.IN_OUT), (Term("ad", "fc", scaled),))
    base = stored(tmp_path / "b", [[0, 0], [0, 0], [0, 2]])
    weight = ChangedWeight(step, base, base, [slice(0, 1), slice(1, 3)])
    norms, bounds = weight.with_norms(Fp64Sum.right(step)).column_norms or ((), ())
    assert list(norms) == [5, 2] and all(0 < bound < 1e-5 for bound in bounds)
    plain = Fp64Sum.right(step).without_magnitude()
    assert weight.with_norms(plain) is plain
