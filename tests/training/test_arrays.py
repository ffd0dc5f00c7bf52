"""Labelled arrays from .npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.training.records.opening import read_labelled_arrays


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_integer_labels_are_classes_and_float_labels_values(tmp_path: Path) -> None:
    classes = read_labelled_arrays(saved(tmp_path / "a.npz", x=np.ones((2, 3)), labels=np.array([2, 0], np.int32)))
    assert (classes.labels.tolist(), classes.labels.dtype) == ([2, 0], np.int64)
    assert classes.inputs["x"].dtype == np.float32
    assert str(classes) == "2 examples of 3 classes"
    values = read_labelled_arrays(saved(tmp_path / "b.npz", x=np.ones((2, 3), np.int64), labels=np.array([0.5, 2])))
    assert (values.labels.tolist(), values.labels.dtype) == ([0.5, 2.0], np.float32)
    assert values.inputs["x"].dtype == np.int64
    assert str(values) == "2 examples"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones(2)}, "has no `labels` beside x"),
        ({"labels": np.arange(2)}, "contains labels alone"),
        ({"x": np.ones(3), "labels": np.arange(2)}, r"`x` has the shape \(3,\), and there are 2 labels"),
        ({"x": np.ones(0), "labels": np.arange(0)}, "contains no examples"),
        ({"x": np.ones(2), "labels": np.array(1)}, r"`labels` has the shape \(\), and there are 0 labels"),
        ({"x": np.array([0, 1e300]), "labels": np.arange(2)}, "`x` contains 1 value that is not finite, .* in row 1"),
        ({"x": np.array([0, np.inf]), "labels": np.arange(2)}, "`x` contains 1 value that is not finite, .* in row 1"),
        ({"x": np.ones(2), "labels": np.array([np.nan, 1])}, "`labels` contains 1 value that is not finite"),
        ({"x": np.ones(2), "labels": np.array(["a", "b"])}, "`labels` contains <U1, not numbers"),
        ({"x": np.ones(3), "labels": np.array([-100, -3, 1])}, "`labels` contain -3; classes are counted from 0"),
        ({"x": np.ones(3), "labels": np.array([-100, 1, 1])}, "all 3 examples have the same label"),
        (
            {"x": np.ones(2), "labels": np.array([{}, {}])},
            "Object arrays cannot be loaded|no .npz file of plain arrays",
        ),
    ],
)
def test_bad_arrays_are_refused_by_name(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        read_labelled_arrays(saved(tmp_path / "a.npz", **arrays))
