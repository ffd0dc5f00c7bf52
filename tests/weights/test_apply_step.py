"""What a step does to some rows in memory, on matrices that a person can add."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair, TokenRows
from lora_export.plan import Layout, Step, TensorSpec, Term
from lora_export.weights.apply_step import Backend, StepRows, apply_by_numpy, refuse_overflow, squared_column_norms

BF16 = np.dtype(ml_dtypes.bfloat16)
PAIR = LoraPair(a=np.array([[1, 2, 3]]), b=np.array([[1], [10]]), scale=1.0)  # BA = [[1, 2, 3], [10, 20, 30]]
SPEC = TensorSpec("fc.weight", (2, 3), "float32", Layout.OUT_IN)
ADDED = Step(SPEC, (Term("mine", "fc", PAIR),))


def applied(step: Step, stored: Any, dtype: Any = np.float32, rows: slice = slice(0, 2), **options: Any) -> Any:
    """The rows after the step, and its statistics."""
    stored = np.asarray(stored, dtype)
    output: NDArray[Any] = np.empty_like(stored)
    scratch = np.empty(16 * stored.size, np.uint8)
    return output, apply_by_numpy(StepRows(step, "name", rows, stored, output, scratch, **options))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BF16])
def test_rows_are_summed_and_measured(dtype):
    output, statistics = applied(ADDED, np.ones((2, 3)), dtype)
    assert output.dtype == dtype and output.astype(float).tolist() == [[2, 3, 4], [11, 21, 31]]
    result = statistics.result()
    assert (result.weight, result.retention, result.changed, result.elements) == ("name", 1.0, 6, 6)


def test_some_rows_get_their_part_of_the_change():
    output, _ = applied(ADDED, np.ones((1, 3)), rows=slice(1, 2))
    assert output.tolist() == [[11, 21, 31]]


def test_rows_that_are_not_measured_have_empty_statistics():
    _, statistics = applied(ADDED, np.ones((2, 3)), measured=False)
    assert statistics.elements == 0 and not statistics.sums.any()


def test_a_replacement_is_rounded_and_has_no_statistics():
    output, statistics = applied(Step(SPEC, replace=np.full((2, 3), 257.0)), np.ones((2, 3)), BF16)
    assert statistics is None and output.astype(float).tolist() == [[256] * 3] * 2


def test_token_rows_replace_only_their_rows():
    step = Step(SPEC, token_rows=TokenRows(np.array([1]), np.array([[7, 8, 9]])))
    output, statistics = applied(step, np.ones((2, 3)))
    assert statistics is None and output.tolist() == [[1, 1, 1], [7, 8, 9]]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_each_value_of_16_bits_is_refused_where_it_is_not_finite(dtype):
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = np.isfinite(values.astype(np.float64))
    refuse_overflow("name", values, values[finite])
    for value in values[~finite]:
        with pytest.raises(InputRefused, match="name: the base holds"):
            refuse_overflow("name", values, np.append(values[:3], value))


def test_column_norms_are_needed_for_dora_on_in_out_weights_only():
    dora = LoraPair(a=PAIR.a, b=PAIR.b, scale=1.0, magnitude=np.array([1, 1]))
    weight = np.zeros((3, 2), np.float32)  # (in, out)
    in_out = TensorSpec("fc.weight", (3, 2), "float32", Layout.IN_OUT)
    pieces = [slice(0, 2), slice(2, 3)]
    norms = squared_column_norms(Step(in_out, (Term("mine", "fc", dora),)), pieces, lambda rows: weight[rows])
    assert norms is not None and norms.tolist() == [14, 1400]
    for step in (Step(in_out, ADDED.terms), Step(SPEC, (Term("mine", "fc", dora),))):
        assert squared_column_norms(step, pieces, lambda rows: pytest.fail("no rows are needed")) is None


@pytest.mark.usefixtures("by_numpy")
def test_a_backend_records_its_device_only():
    assert Backend().settings == {}
    assert Backend(device="cuda (a GPU)").settings == {"device": "cuda (a GPU)"}
