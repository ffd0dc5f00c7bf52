"""The names and axes of experts: the frozen classes are derived again from the installed transformers."""

from __future__ import annotations

import pytest

from lora_export.lora import ExpertAxes
from lora_export.names.experts import STORED_IN_OUT, TRANSPOSED_CLASSES, is_turned, model_types
from support.stacked_parameters import classes_of_experts

GPT_OSS, LLAMA_4, MIXTRAL = {"gpt_oss"}, {"llama4", "llama4_text"}, {"mixtral"}


@pytest.mark.parametrize(
    ("axes", "wanted", "types", "expected"),
    [
        (ExpertAxes.OUT_IN, ExpertAxes.OUT_IN, (), False),
        (ExpertAxes.STORED, ExpertAxes.OUT_IN, GPT_OSS, True),
        (ExpertAxes.STORED, ExpertAxes.OUT_IN, LLAMA_4, True),
        (ExpertAxes.STORED, ExpertAxes.OUT_IN, MIXTRAL, False),
        (ExpertAxes.STORED, ExpertAxes.OUT_IN, (), None),
        (ExpertAxes.BY_CLASS, ExpertAxes.OUT_IN, GPT_OSS, False),
        (ExpertAxes.BY_CLASS, ExpertAxes.OUT_IN, LLAMA_4, True),
        (ExpertAxes.TRANSPOSED, ExpertAxes.OUT_IN, MIXTRAL, True),
        (ExpertAxes.TRANSPOSED, ExpertAxes.OUT_IN, GPT_OSS, False),
        (ExpertAxes.UNKNOWN, ExpertAxes.OUT_IN, MIXTRAL, None),
        (ExpertAxes.OUT_IN, ExpertAxes.BY_CLASS, GPT_OSS, False),
        (ExpertAxes.OUT_IN, ExpertAxes.BY_CLASS, LLAMA_4, True),
        (ExpertAxes.OUT_IN, ExpertAxes.BY_CLASS, MIXTRAL, False),
        (ExpertAxes.STORED, ExpertAxes.BY_CLASS, GPT_OSS, True),
        (ExpertAxes.STORED, ExpertAxes.BY_CLASS, LLAMA_4, False),
        (ExpertAxes.BY_CLASS, ExpertAxes.BY_CLASS, (), False),
    ],
)
def test_a_pair_is_turned_where_its_axes_are_not_those(axes, wanted, types, expected):
    assert is_turned(axes, wanted, types) is expected


def test_the_classes_are_those_of_transformers():
    packages = {one.package for one in classes_of_experts() if one.is_transposed}
    assert packages == TRANSPOSED_CLASSES - {"aria_text"}
    assert {"llama4", "llama4_text"} == STORED_IN_OUT - TRANSPOSED_CLASSES


def test_model_types_of_nested_configs_are_found():
    config = {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}, "vision_config": {"model_type": 7}}
    assert model_types(config) == {"llama4", "llama4_text"}
