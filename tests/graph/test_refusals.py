"""Plans that a graph refuses, and results that are not finite."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused, MatchError, Misfit
from lora_export.formats.peft_kinds import entry_wise
from lora_export.graph.find_sites import find_sites
from lora_export.graph.refusals import base_as_remedy, refuse_lost_biases
from lora_export.lora import LoraPair
from lora_export.pairs.transforms import WeightTransform
from support.graphs import a_graph, an_adapter, planned
from support.small_graphs import GEMM, PAIR, folded


def test_overflow_is_refused_with_limit() -> None:
    model = a_graph(GEMM)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.ones((2, 3), np.float16), name="m.weight")
    pair = LoraPair(a=PAIR.a, b=PAIR.b, scale=40_000.0)
    with pytest.raises(InputRefused, match=r"m.weight: 2 values would not be finite: the largest float16 is 65504"):
        folded(model, an_adapter({"m": pair}))


def test_base_that_is_not_finite_is_refused_as_such() -> None:
    model = a_graph(GEMM)
    weight = np.float32([[1, 2, np.nan], [4, 5, 6]])
    model.graph.initializers["m.weight"].const_value = ir.Tensor(weight, name="m.weight")
    with pytest.raises(InputRefused, match="1 value would not be finite: the graph's own tensor"):
        folded(model, an_adapter({"m": PAIR}))


def test_added_tensor_is_refused() -> None:
    model = a_graph(GEMM)
    adapter = an_adapter({"m": PAIR}, replaced={"head.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(InputRefused, match=r"the graph has no head.weight"):
        folded(model, adapter, may_add=True)


def test_base_is_named_where_a_layer_has_no_name() -> None:
    misfit = MatchError([Misfit("fr", "up", "no such weight")], targets=1)
    for graph, remedy in ((GEMM, False), (GEMM.replace("m.weight", "val_3"), True)):
        model = a_graph(graph)
        with pytest.raises(MatchError) as caught, base_as_remedy(find_sites(model)):
            raise misfit
        assert ("1 linear layer of the graph lost the name" in str(caught.value)) is remedy
        assert ('checkpoint="CHECKPOINT"' in str(caught.value)) is remedy
        assert caught.value.misfits == misfit.misfits


UNNAMED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
g (float[N,3] x) => (float[N,2] y) <float[2,3] "m.weight" = {1,2,3,4,5,6}, float[2] c = {1,2}> { BODY }
"""
PRODUCT = '[n] k = Gemm <transB = 1> (x, "m.weight")'


@pytest.mark.parametrize(
    ("body", "is_refused"),
    [
        ('[n] y = Gemm <transB = 1> (x, "m.weight", c)', True),
        ('[n] y = com.microsoft.FusedGemm <transB = 1, activation = "Relu"> (x, "m.weight", c)', True),
        (f"{PRODUCT}\n[b] y = Add(c, k)", True),
        (f"{PRODUCT}\n[i] d = Identity(c)\n[b] y = Add(k, d)", True),
        (f"{PRODUCT}\n[c] d = Constant <value = float[1,2] {{1,2}}> ()\n[b] y = Add(k, d)", True),
        (f"{PRODUCT}\n[b] y = com.microsoft.BiasGelu(k, c)", True),
        (f"{PRODUCT}\n[b] y = Relu(k)", False),
    ],
)
def test_a_bias_without_a_name_is_not_left_as_it_was(body, is_refused):
    """It would be scaled with the weight."""
    scales = {"ia3_l": np.float32([2, 3])}
    bias = WeightTransform("IA3", scales, entry_wise._lower_ia3, (2,), settings={"of_inputs": False})
    change = WeightTransform("IA3", scales, entry_wise._lower_ia3, (2, 0), settings={"of_inputs": False}, bias=bias)
    sites, steps = planned(ir.from_onnx_text(UNNAMED.replace("BODY", body)), an_adapter({"m": change}))
    with pytest.raises(InputRefused, match="IA3 scales the bias of the layer too") if is_refused else nullcontext():
        refuse_lost_biases(steps, sites)
