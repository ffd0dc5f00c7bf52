"""Which layers of a quantised base keep their scheme, and which are promoted together."""

from __future__ import annotations

import math

import pytest

from lora_export.errors import InputRefused
from lora_export.weights.merge_report import QuantisedLayer, StepResult
from lora_export.weights.quantised_layers import refuse_promotion, why_promoted, with_bound_layers


@pytest.mark.parametrize(
    ("retention", "noise", "why"),
    [
        (0.5, 1.0, ""),
        (0.49, 0.9, "49.0% of its change would be left"),
        (-0.2, 0.9, "0.0% of its change would be left"),
        (math.nan, 0.9, "nan% of its change would be left"),
        (1.0, 2.5, "the noise would be 2.5 times its change"),  # as stochastic rounding has it
    ],
)
def test_a_layer_needs_retention_and_little_noise(retention: float, noise: float, why: str) -> None:
    assert why_promoted(StepResult("w", 0.01, retention, noise, 1, 1), 0.5) == why


def test_parts_that_a_server_fuses_are_promoted_together() -> None:
    names = [f"h.{layer}.attn.{part}_proj.weight" for layer in (0, 1) for part in "qkvo"]
    experts = [
        f"h.{layer}.mlp.experts.{number}.w{part}.weight" for layer in (0, 1) for number in (0, 1) for part in "12"
    ]
    found = with_bound_layers({names[1]: "lost", experts[2]: "lost"}, [*names, *experts])
    assert found == {
        names[0]: f"fused with {names[1]}",
        names[1]: "lost",
        names[2]: f"fused with {names[1]}",
        experts[0]: f"fused with {experts[2]}",
        experts[1]: f"fused with {experts[2]}",
        experts[2]: "lost",
        experts[3]: f"fused with {experts[2]}",
    }


def test_layers_whose_names_contain_that_of_a_promoted_one_follow_it() -> None:
    names = ["a.fc.weight", "a.fc2.weight", "vision.a.fc.weight", "b.fc.weight"]
    found = with_bound_layers({names[0]: "lost"}, names)
    assert found == {names[0]: "lost"} | dict.fromkeys(names[1:3], f"its name contains that of {names[0]}")


def test_promotion_that_no_config_can_state_is_refused() -> None:
    kept = QuantisedLayer("a", "nf4", "nf4", "", 0.9, 0.1)
    refuse_promotion([kept], 1, "the config cannot", "Give up")
    lost = QuantisedLayer("b", "nf4", "bfloat16", "1.0% of its change would be left", 0.01, 1.0)
    with pytest.raises(InputRefused) as refused:
        refuse_promotion([kept, lost], 2, "the config cannot", "Give up")
    text = str(refused.value)
    assert text.startswith("1 of 2 quantised weights cannot hold their change, and the config cannot:\n")
    assert "b (nf4): 1.0% of its change" in text and text.endswith("Give up")
