"""The names of a module's outputs."""

from __future__ import annotations

import pytest
import torch

from lora_export.errors import RuntimeRefused
from lora_export.models.output_names import have_names, named_outputs

ONE, TWO = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (ONE, ["output_0"]),
        ((ONE, None, TWO), ["output_0", "output_2"]),
        ({"logits": ONE, "loss": None, "states": (TWO, TWO)}, ["logits", "states.0", "states.1"]),
        ([{"a": ONE}], ["output_0.a"]),
    ],
)
def test_outputs_are_named_by_keys_or_positions(outputs: object, names: list[str]) -> None:
    assert list(named_outputs(outputs)) == names
    assert have_names(named_outputs(outputs)) is (names[0] == "logits")


def test_outputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(RuntimeRefused, match="the model returned dict, which contains no tensors"):
        named_outputs({"loss": None})
