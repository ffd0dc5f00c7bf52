"""Names of adapter inputs by the conventions of other tools."""

from __future__ import annotations

import numpy as np
import pytest

from support.graphs import a_graph, an_adapter, run
from support.insertion import X, adapter_inputs, with_inputs
from support.small_graphs import GEMM, PAIR


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("olive", ["h.0.self_attn.q.lora_A.weight", "h.0.self_attn.q.lora_B.weight"]),
        ("genai", ["h.0.attn.q.lora_A.MatMul.weight", "h.0.attn.q.lora_B.MatMul.weight"]),
        ("peft", ["base_model.model.h.0.self_attn.q.lora_A.weight", "base_model.model.h.0.self_attn.q.lora_B.weight"]),
    ],
)
def test_inputs_of_linear_layer_follow_convention(names: str, expected: list[str]) -> None:
    model = a_graph(GEMM.replace("m.weight", "h.0.self_attn.q.weight"))
    contract = with_inputs(model, "h.0.self_attn.q.weight", names=names)
    assert [value.name for value in model.graph.inputs[1:]] == expected
    fed = adapter_inputs(contract, an_adapter({"h.0.self_attn.q": PAIR}))
    assert sorted(fed) == expected and np.array_equal(run(model, x=X, **fed)["y"], [[7, 17], [7, 17]])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("olive", ["h.self_attn.e.lora_A.weight", "h.self_attn.e.lora_B.weight", "h.self_attn.e.{}.weight"]),
        ("genai", ["h.attn.e.lora_A.MatMul.weight", "h.attn.e.lora_B.MatMul.weight", "h.attn.e.{}.weight"]),
        ("peft", ["base_model.model.h.self_attn.e.lora_embedding_A", "base_model.model.h.self_attn.e.lora_embedding_B",
                  "base_model.model.h.self_attn.e.{}"]),
    ],
)  # fmt: skip
def test_inputs_of_embedding_follow_convention(names: str, expected: list[str]) -> None:
    model = a_graph("""
        g (int64[N] ids) => (float[N,2] y) <float[3,2] h.self_attn.e.weight = {1,2,3,4,5,6}>
        { [n] y = Gather(h.self_attn.e.weight, ids) }""")
    with_inputs(model, "h.self_attn.e.weight", names=names, dora=["h.self_attn.e.weight"])
    assert [value.name for value in model.graph.inputs[1:]] == [
        name.format("lora_magnitude_vector") for name in expected
    ]
