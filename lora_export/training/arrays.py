"""Labelled arrays from an .npz file, one row per example for each of the model's inputs. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, count_that_are, listed
from lora_export.storage.npz import read_arrays

IGNORED = -100  # the label that cross-entropy ignores


@dataclass(frozen=True, eq=False)
class LabelledArrays:
    """Arrays with one row per example."""

    inputs: Mapping[str, NDArray[Any]]  # parameter of forward -> (n, ...)
    labels: NDArray[Any]  # (n, ...): int64 indices of classes, or float32 values to predict

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        if self.labels.dtype.kind == "f":
            return f"{len(self):,} examples"
        return f"{len(self):,} examples of {int(self.labels.max(initial=-1)) + 1} classes"


def read_labelled_arrays(path: Path) -> LabelledArrays:
    """Read an .npz file with arrays named like forward's parameters, and `labels`.

    Integer labels are classes, float labels are values to predict. Raises InputRefused with the arrays that are wrong.
    """
    arrays = read_arrays(path)
    if "labels" not in arrays:
        raise InputRefused(f"{path} has no `labels` beside {', '.join(arrays) or 'nothing'}")
    labels = arrays.pop("labels")
    if problems := _array_problems(arrays, labels):
        raise InputRefused(f"{path}:", listed(problems))
    if not len(labels):
        raise InputRefused(f"{path} contains no examples")
    # NumPy's default is fp64, but a module is trained in fp32.
    inputs = {
        name: values.astype(np.float32) if values.dtype.kind == "f" else values for name, values in arrays.items()
    }
    return LabelledArrays(inputs, labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64))


def _array_problems(arrays: Mapping[str, NDArray[Any]], labels: NDArray[Any]) -> list[str]:
    count = len(labels) if labels.ndim else 0
    problems = [] if arrays else ["it contains labels alone"]
    for name, values in {**arrays, "labels": labels}.items():
        if values.shape[:1] != (count,):
            problems.append(f"`{name}` has the shape {values.shape}, and there are {count} labels")
        elif values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = np.argwhere(~np.isfinite(values))
            what = f"`{name}` contains {count_that_are(len(bad), 'value')} not finite"
            problems.append(f"{what}, the first in row {bad[0][0]}")
        elif values.dtype.kind not in "fiub":
            problems.append(f"`{name}` contains {values.dtype}, not numbers")
    negative = labels[(labels < 0) & (labels != IGNORED)] if labels.dtype.kind == "i" else labels[:0]
    if negative.size:
        problems.append(f"`labels` contain {negative[0]}; classes are counted from 0 ({IGNORED} is ignored)")
    counted = labels[labels != IGNORED]
    if not problems and labels.dtype.kind in "iub" and count and len(np.unique(counted)) < 2:
        problems.append(f"all {count} examples have the same label; there is nothing to learn")
    return problems
