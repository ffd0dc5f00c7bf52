"""The ways to read the names of an adapter: what the base's own spelling finds."""

from __future__ import annotations

import numpy as np

from lora_export.lora import LoraPair
from lora_export.plan import Layout, TensorSpec
from lora_export.plan.attempts import AsSpelled, module_of_tensor, pair_weight, shape_in_model
from lora_export.plan.match_names import BaseTensors
from support.plans import holding
from support.small_layers import a_pair

BASE = BaseTensors(
    [
        TensorSpec("model.a.weight", (4, 3), "float32", Layout.OUT_IN),
        TensorSpec("model.experts.down", (2, 4, 3), "float32", Layout.OUT_IN),
        TensorSpec("model.graph.down[0]", (4, 3), "float32", Layout.OUT_IN),
        TensorSpec("model.graph.down[1]", (4, 3), "float32", Layout.OUT_IN),
    ]
)


def test_a_prefix_of_the_base_is_found_and_noted():
    attempt = AsSpelled(holding(pairs={"a": a_pair(4, 3)}), BASE)
    assert (attempt.matched, attempt.weights_of("a"), attempt.weights_of("b")) == (1, ["model.a.weight"], [])
    assert (
        attempt.spelled()
        .notes[0]
        .endswith("the base's names have the prefix `model.`, which the adapter's names lack; resolved.")
    )


def test_a_part_of_a_stacked_parameter_is_a_view_of_it():
    pairs = {f"model.experts.down[{number}]": a_pair(4, 3) for number in range(2)}
    attempt = AsSpelled(holding(pairs=pairs), BASE)
    views = attempt.spelled().views
    assert {name: view.shape for name, view in views.items()} == {f"model.experts.down[{n}]": (4, 3) for n in range(2)}
    assembled = attempt.assembled("model.experts.down")
    assert assembled is not None and assembled.shape == (2, 4, 3)


def test_a_base_that_has_each_expert_as_a_tensor_stacks_them():
    attempt = AsSpelled(holding(pairs={"model.graph.down[0]": a_pair(4, 3)}), BASE)
    assert attempt.stack_of_parts("model.graph.down") == (2, 4, 3)
    assert attempt.stack_of_parts("model.a") is None


def test_the_tensor_of_a_pair_is_that_of_the_model():
    embedding = LoraPair(a=np.ones((1, 5)), b=np.ones((3, 1)), scale=1, embedding=True)
    parameter = LoraPair(a=np.ones((1, 5)), b=np.ones((3, 1)), scale=1, as_stored=True)
    assert (shape_in_model(embedding), shape_in_model(parameter)) == ((5, 3), (3, 5))
    assert (pair_weight("m", embedding), pair_weight("m", parameter)) == ("m.weight", "m")
    names = ["a.weight", "attn.in_proj_weight", "a.bias"]
    assert [module_of_tensor(name) for name in names] == ["a", "attn", "a.bias"]
