"""Which output is the next value of which input of the cache."""

from __future__ import annotations

from lora_export.graph.cache_names import present_by_past


def test_names_are_paired_without_their_first_part() -> None:
    inputs = ["input_ids", "past_key_values.0.key", "past_key_values.0.value", "past/1.key", "past_key_values.7.key"]
    outputs = ["logits", "present.0.value", "present.0.key", "present_1/1.key"]
    assert present_by_past(inputs, outputs) == {
        "past_key_values.0.key": "present.0.key",
        "past_key_values.0.value": "present.0.value",
        "past/1.key": "present_1/1.key",
    }


def test_states_of_one_layer_are_told_apart() -> None:
    inputs, outputs = ["past_conv.0", "past_recurrent.0"], ["present_recurrent.0", "present_conv.0"]
    assert present_by_past(inputs, outputs) == dict(zip(inputs, reversed(outputs), strict=True))


def test_state_of_one_name_is_its_own_next_value() -> None:
    assert present_by_past(["state", "x"], ["state", "y"]) == {"state": "state"}
