"""Names of litgpt's families in Hugging Face's models. `test_litgpt.py` compares the changes with litgpt's."""

from __future__ import annotations

import pytest

from lora_export.errors import InputRefused
from lora_export.formats.litgpt_names import QkvForm, names_of_family


@pytest.mark.parametrize(
    ("name", "mlp_class", "form", "output"),
    [
        ("Llama-3.2-1B", "LLaMAMLP", QkvForm.SPLIT, "model.layers.{}.self_attn.o_proj"),
        ("OLMo-2-7B", "LLaMAMLP", QkvForm.SPLIT, "model.layers.{}.self_attn.o_proj"),
        ("Phi-4", "LLaMAMLP", QkvForm.FUSED, "model.layers.{}.self_attn.o_proj"),
        ("phi-1_5", "GptNeoxMLP", QkvForm.SPLIT, "model.layers.{}.self_attn.dense"),
        ("falcon-40b", "GptNeoxMLP", QkvForm.ALTERNATING, "transformer.h.{}.self_attention.dense"),
        ("pythia-14m", "GptNeoxMLP", QkvForm.ALTERNATING, "gpt_neox.layers.{}.attention.dense"),
    ],
)
def test_a_family_is_found_by_name_and_class(name: str, mlp_class: str, form: QkvForm, output: str) -> None:
    names = names_of_family(name, mlp_class)
    assert (names.form, names.layers["attn.proj"]) == (form, output)


def test_a_class_without_a_conversion_is_refused() -> None:
    with pytest.raises(InputRefused, match="has mlp_class_name 'NewMLP', and litgpt has no conversion of it"):
        names_of_family("New-1B", "NewMLP")
