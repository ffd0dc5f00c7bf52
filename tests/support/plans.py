"""Pairs, adapters and bases for the tests of plans. A base is a list of names and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.errors import MatchError
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.plan import Layout, Plan, TensorSpec

A = [[1, 2, 3]]  # (rank 1, in 3)
B = [[1], [10]]  # (out 2, rank 1)
BA = [[1, 2, 3], [10, 20, 30]]


def pair(a: Any = A, b: Any = B, scale: float = 1.0) -> LoraPair:
    return LoraPair(a=np.array(a), b=np.array(b), scale=scale)


def adapter(name: str = "mine", **pairs: LoraPair) -> Adapter:
    """An adapter of these modules; a double underscore means a dot."""
    return Adapter(name, "peft", {module.replace("__", "."): pair for module, pair in pairs.items()})


def holding(name: str = "mine", **fields: Any) -> Adapter:
    return Adapter(name, "peft", fields.pop("pairs", {}), **fields)


def matrix(name: str, out: int = 2, in_: int = 3, *, layout: Layout = Layout.OUT_IN, **fields: Any) -> TensorSpec:
    return TensorSpec(name, (out, in_), fields.pop("dtype", "float32"), layout, **fields)


def vector(name: str, size: int = 2) -> TensorSpec:
    return TensorSpec(name, (size,), "float32")


def misfits(adapters: list[Adapter], base: list[TensorSpec], **options: Any) -> list[str]:
    with pytest.raises(MatchError) as refused:
        plan.make(adapters, base, **options)
    return list(map(str, refused.value.misfits))


def changes(made: Plan) -> dict[str, list[Any]]:
    return {step.weight: sums.delta(step).tolist() for step in made.steps}


def unknown(name: str, rows: int = 2, columns: int = 2) -> TensorSpec:
    return matrix(name, rows, columns, layout=Layout.UNKNOWN)


def square() -> LoraPair:
    return pair([[1, 2]], [[1], [10]])


def tied() -> TensorSpec:
    return matrix("emb.weight", aliases=("head.weight",))


def table(a: Any = A, b: Any = B, **fields: Any) -> LoraPair:
    return LoraPair(a=np.array(a), b=np.array(b), scale=1.0, embedding=True, **fields)


def rows(*indices: int, width: int = 3) -> TokenRows:
    return TokenRows(np.array(indices), np.ones((len(indices), width), np.float32) * (1 + np.array(indices)[:, None]))
