"""What several tests share: small_graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.fold import fold
from lora_export.lora import Adapter, LoraPair
from lora_export.weights.merge_report import StepResult
from support.graphs import (
    an_adapter,
    planned,
)

# ΔW = 2 * [[1], [2]] [[1, 0, -1]] = [[2, 0, -2], [4, 0, -4]]   (out, in)
PAIR = LoraPair(a=[[1, 0, -1]], b=[[1], [2]], scale=2.0)

LINEAR = """
g (float[N,3] x) => (float[N,2] y)
<float[3,2] m.weight = {1,4,2,5,3,6}, float[2] m.bias = {10,20}, float[2] other.bias = {7,8}>
{ [n] h = MatMul(x, m.weight)
  [b] k = Add(h, m.bias)
  [o] y = Mul(k, other.bias) }
"""

GEMM = """
g (float[N,3] x) => (float[N,2] y)
<float[2,3] m.weight = {1,2,3,4,5,6}>
{ [n] y = Gemm <transB = 1> (x, m.weight) }
"""

# Two 2 x 2 layers that share [[1, 2], [3, 4]] (in, out)
SHARED = """
g (float[N,2] x) => (float[N,2] y)
<float[2,2] a.fc.weight = {1,2,3,4}>
{ [first] h = MatMul(x, a.fc.weight)
  [second] y = MatMul(h, a.fc.weight) }
"""

SQUARE = LoraPair(a=[[1, 0]], b=[[1], [2]], scale=1.0)  # ΔW = [[1, 0], [2, 0]] (out, in)


def folded(model: ir.Model, *adapters: Adapter, **options: Any) -> list[StepResult]:
    found, steps = planned(model, *adapters, **options)
    return fold(model, found, steps)


def everywhere(model: ir.Model, *, seed: int = 0) -> tuple[Adapter, dict[str, NDArray[Any]]]:
    """Random pairs for every linear layer, and the ΔW that they mean."""
    rng = np.random.default_rng(seed)
    pairs, changes = {}, {}
    for spec in find_sites(model).specs:
        if spec.layout not in (plan.Layout.OUT_IN, plan.Layout.IN_OUT) or len(spec.shape) > 2:
            continue
        out, inner = spec.matrix
        pair = LoraPair(a=rng.normal(size=(2, inner)), b=rng.normal(size=(out, 2)) * 0.3, scale=0.5)
        pairs[spec.name.removesuffix(".weight").removesuffix(".in_proj_weight")] = pair
        changes[spec.name] = 0.5 * pair.b.astype(np.float64) @ pair.a.astype(np.float64)
    return an_adapter(pairs), changes
