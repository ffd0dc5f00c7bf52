"""Pairs of experts that A and B were trained on as stored, or transposed. Products are compared by their values."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name
from lora_export.plan.expert_axes import STORED_IN_OUT, TRANSPOSED_CLASSES, model_types, turned
from support.stacked_parameters import classes_of_experts

SQUARE = np.array([[1.0], [2]]), np.array([[3.0, 4]])  # B (2, 1), A (1, 2)
TALL = np.array([[1.0], [2], [5]]), np.array([[3.0, 4]])  # B (3, 1), A (1, 2)
UP, DOWN = "m.experts.up_proj", "m.experts.down_proj"


def stacked(axes: ExpertAxes, count: int = 2, **factors: tuple[np.ndarray, np.ndarray]) -> Adapter:
    """Pairs of `count` experts of the parameters up_proj and down_proj. Expert e has the scale e + 1."""
    names = {f"m.experts.{name}": pair for name, pair in factors.items()}
    pairs = {
        expert_name(name, expert): LoraPair(a=a, b=b, scale=expert + 1.0, as_stored=True)
        for name, (b, a) in names.items()
        for expert in range(count)
    }
    return Adapter("ad", "peft", pairs, experts=dict.fromkeys(names, axes))


def products(adapter: Adapter, parameter: str) -> list[list[list[float]]]:
    return [adapter.pairs[expert_name(parameter, expert)].delta().tolist() for expert in range(2)]


AS_STORED = [[[3, 4], [6, 8]], [[6, 8], [12, 16]]]
TRANSPOSED = [[[3, 6], [4, 8]], [[6, 12], [8, 16]]]


@pytest.mark.parametrize(
    ("axes", "types", "expected"),
    [
        (ExpertAxes.STORED, set(), AS_STORED),
        (ExpertAxes.TRANSPOSED, set(), TRANSPOSED),
        (ExpertAxes.BY_CLASS, {"mixtral"}, AS_STORED),
        (ExpertAxes.BY_CLASS, {"gpt_oss"}, TRANSPOSED),
        (ExpertAxes.BY_CLASS, {"llama4", "llama4_text"}, AS_STORED),
        (ExpertAxes.OUT_IN, {"mixtral"}, AS_STORED),
        (ExpertAxes.OUT_IN, {"gpt_oss"}, TRANSPOSED),
        (ExpertAxes.OUT_IN, {"llama4_text"}, TRANSPOSED),
    ],
)
def test_square_experts_follow_the_record_and_the_class(axes, types, expected):
    found, misfits = turned(stacked(axes, up_proj=SQUARE), {UP: (2, 2, 2)}.get, types)
    assert (products(found, UP), misfits, dict(found.experts)) == (expected, [], {})


@pytest.mark.parametrize(("shape", "expected"), [((2, 3, 2), [[3, 4], [6, 8], [15, 20]]), ((2, 2, 3), None)])
def test_the_shape_decides_where_an_expert_is_not_square(shape, expected):
    found, _ = turned(stacked(ExpertAxes.UNKNOWN, up_proj=TALL), {UP: shape}.get, ())
    assert products(found, UP)[0] == (expected or [[3, 6, 15], [4, 8, 20]])


@pytest.mark.parametrize(("shape", "expected"), [((2, 3, 2), AS_STORED), ((2, 2, 3), TRANSPOSED)])
def test_a_square_parameter_follows_another_one_of_its_module(shape, expected):
    adapter = stacked(ExpertAxes.BY_CLASS, up_proj=TALL, down_proj=SQUARE)
    found, _ = turned(adapter, {UP: shape, DOWN: (2, 2, 2)}.get, {"mixtral"})
    assert products(found, DOWN) == expected


@pytest.mark.parametrize(
    ("axes", "types", "message"),
    [
        (ExpertAxes.UNKNOWN, {"mixtral"}, "the adapter records no peft_version"),
        (ExpertAxes.BY_CLASS, set(), "the base has no config with a model_type"),
        (ExpertAxes.OUT_IN, set(), "the base has no config with a model_type"),
    ],
)
def test_square_experts_without_a_record_are_refused(axes, types, message):
    with pytest.raises(InputRefused, match=f"{UP} of ad: each expert is a square matrix, and {message}"):
        turned(stacked(axes, up_proj=SQUARE), {UP: (2, 2, 2)}.get, types)


@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 2, 2), (2, 2)])
def test_another_number_of_experts_is_a_misfit(shape):
    found, (misfit,) = turned(stacked(ExpertAxes.STORED, up_proj=SQUARE), {UP: shape}.get, ())
    assert str(misfit.problem) == f"the adapter was trained on 2 experts, and {UP} is {shape} in the base"
    assert not found.pairs


def test_a_parameter_that_the_base_lacks_keeps_its_pairs():
    adapter = stacked(ExpertAxes.STORED, up_proj=SQUARE)
    found, misfits = turned(adapter, {}.get, ())
    assert (found.pairs.keys(), misfits) == (adapter.pairs.keys(), [])


def test_the_pair_of_a_bare_parameter_is_that_of_its_only_expert():
    b, a = SQUARE
    adapter = Adapter("ad", "peft", {UP: LoraPair(a=a, b=b, scale=1, as_stored=True)}, layouts={UP: "out_in"})
    found, _ = turned(adapter, {UP: (1, 2, 2)}.get, ())
    assert (list(found.pairs), dict(found.layouts)) == ([f"{UP}[0]"], {})
    unchanged, _ = turned(adapter, {UP: (2, 2)}.get, ())
    assert list(unchanged.pairs) == [UP]


def test_the_classes_are_those_of_transformers():
    packages = {one.package for one in classes_of_experts() if one.is_transposed}
    assert packages == TRANSPOSED_CLASSES - {"aria_text"}
    assert {"llama4", "llama4_text"} == STORED_IN_OUT - TRANSPOSED_CLASSES


def test_model_types_of_nested_configs_are_found():
    config = {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}, "vision_config": {"model_type": 7}}
    assert model_types(config) == {"llama4", "llama4_text"}
