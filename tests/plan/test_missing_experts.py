"""The tensors of experts that an adapter lacks."""

from __future__ import annotations

import pytest

from lora_export.plan.converted_attempts import with_missing_experts
from support.spellings import EXPERTS, MIXTRAL

SHAPES = {"model.layers.0.mlp.experts.gate_up_proj": (2, 6, 4), "model.layers.0.mlp.experts.down_proj": (2, 4, 3)}


@pytest.mark.parametrize("own", [["0.w1"], ["1.w3"], ["0.w1", "1.w3"]])
def test_all_experts_and_both_halves_are_found(own: list[str]) -> None:
    shapes = {f"{EXPERTS}.{name}.weight": (3, 4) for name in own}
    found = with_missing_experts(shapes, MIXTRAL, SHAPES.get)
    assert found == {f"{EXPERTS}.{expert}.{name}.weight": (3, 4) for expert in range(2) for name in ("w1", "w3")}


def test_nothing_is_added_where_the_base_stacks_nothing() -> None:
    shapes = {f"{EXPERTS}.0.w1.weight": (3, 4), "model.layers.0.self_attn.q_proj.weight": (4, 4)}
    assert with_missing_experts(shapes, MIXTRAL, {}.get) == shapes
