"""Tensors to which nothing is added, bit by bit: those of the base, and those of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_export.lora import TokenRows
from lora_export.plan import Step
from lora_export.verification.against_checkpoint import stored_tensor
from lora_export.verification.against_checkpoint.judge_rounded import judge_rounded
from lora_export.verification.against_checkpoint.result import AuditedWeight, Fate
from lora_export.verification.parity import Outcome
from support.plans import matrix
from support.stored_tensors import stored

BASE = [[1.5, 2.0, -0.0], [4.0, np.nan, 6.0], [7.0, 8.0, 9.0]]
HEAD = np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9.25]])
ROW = TokenRows(np.array([2]), np.float32([[10, 11, 12]]))


@pytest.fixture(autouse=True, params=[1, 1 << 22], ids=["row by row", "whole"])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensor, "PIECE_BYTES", request.param)


def judged(
    folder: Path, values: Any, step: Step | None = None, *, dtype: Any = np.float32, base: Any = BASE
) -> AuditedWeight:
    before = None if base is None else stored(folder / "base.safetensors", base)
    return judge_rounded("fc.weight", step, before, stored(folder / "merged.safetensors", values, dtype))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_a_kept_tensor_has_the_bits_of_the_base(tmp_path: Path, dtype: Any) -> None:
    found = judged(tmp_path, np.asarray(BASE, np.float32).astype(dtype), dtype=dtype)
    assert (found.fate, found.outcome, found.elements, found.controls) == (Fate.KEPT, Outcome.SAME, 9, {})


@pytest.mark.parametrize(
    ("position", "value"), [((0, 2), 0.0), ((1, 1), -np.nan), ((2, 2), np.nextafter(np.float32(9), 10))]
)
def test_another_bit_is_another_number(tmp_path: Path, position: tuple[int, int], value: float) -> None:
    values = np.float32(BASE)
    values[position] = value
    found = judged(tmp_path, values)
    assert (found.outcome, found.off) == (Outcome.DIFFERENT, 1)
    assert found.why == "1 of 9 entries are not the base's"


def test_a_replaced_tensor_has_the_bits_of_the_adapter(tmp_path: Path) -> None:
    step = Step(matrix("fc.weight", 3, 3), replace=HEAD)
    found = judged(tmp_path, HEAD, step)
    assert (found.fate, found.outcome, found.controls) == (Fate.REPLACED, Outcome.SAME, {"base": True})
    rounded = HEAD.astype(ml_dtypes.bfloat16)
    assert judged(tmp_path, rounded, step, dtype=ml_dtypes.bfloat16).outcome is Outcome.SAME
    wrong = judged(tmp_path, BASE, step)
    assert (wrong.outcome, wrong.why) == (Outcome.DIFFERENT, "4 of 9 entries are not the adapter's")


def test_a_tensor_that_the_base_lacks_is_compared_with_the_adapters(tmp_path: Path) -> None:
    step = Step(matrix("fc.weight", 3, 3), replace=HEAD, added=True)
    assert judged(tmp_path, HEAD, step, base=None).controls == {"base": True}
    assert judged(tmp_path, HEAD + 1, step, base=None).off == 9


def test_replaced_rows_leave_the_others_to_the_base(tmp_path: Path) -> None:
    step, values = Step(matrix("fc.weight", 3, 3), token_rows=ROW), np.float32(BASE)
    values[2] = [10, 11, 12]
    found = judged(tmp_path, values, step)
    assert (found.outcome, found.controls) == (Outcome.SAME, {"base": True})
    first = Step(matrix("fc.weight", 3, 3), token_rows=TokenRows(np.array([0]), np.float32([[10, 11, 12]])))
    assert judged(tmp_path, [[10, 11, 12], *BASE[1:]], first).controls == {"base": True}
    assert judged(tmp_path, BASE, step).off == 3
    values[0, 0] = 99
    assert judged(tmp_path, values, step).off == 1


def test_an_adapter_that_replaces_nothing_is_not_detected(tmp_path: Path) -> None:
    found = judged(tmp_path, BASE, Step(matrix("fc.weight", 3, 3), replace=np.float32(BASE)))
    assert (found.outcome, found.controls) == (Outcome.SAME, {"base": False})
