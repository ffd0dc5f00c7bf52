"""A weight that a step changes, before and after, and the norms of DoRA's columns."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from lora_export.lora import LoraPair
from lora_export.plan import Layout, Step, Term
from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight
from lora_export.verification.against_checkpoint.fp64_sums import Fp64Sum
from support.plans import matrix, pair
from support.stored_tensors import stored

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
