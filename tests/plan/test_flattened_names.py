"""Names in which `_` stands for the dots, resolved by the names of a base."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.plan.spelling import with_dots
from support.small_layers import a_pair


def flattened(*names: str, **fields) -> Adapter:
    pairs = {name: a_pair(4, 4) for name in names}
    return Adapter(
        "x", "kohya", pairs, flattened=True, spelling={name: f"lora_unet_{name}" for name in names}, **fields
    )


def test_dots_come_from_the_names_of_the_base():
    adapter = flattened("blocks_0_to_q", "blocks_10_to_out_0")
    found = with_dots(adapter, [["blocks.0.to_q.weight", "blocks.10.to_out.0.weight", "blocks.0.to_q.bias"]])
    assert list(found.pairs) == ["blocks.0.to_q", "blocks.10.to_out.0"]
    assert not found.flattened
    assert found.spelled("blocks.0.to_q") == "lora_unet_blocks_0_to_q"


def test_every_table_of_the_adapter_gets_the_names():
    ones = np.ones(4, np.float32)
    adapter = flattened("a_b", biases={"a_b": ones}, added={"a_n.weight": ones}, layouts={"a_b": "out_in"})
    found = with_dots(adapter, [["a.b.weight", "a.n.weight"]])
    assert (list(found.pairs), list(found.biases), list(found.added)) == (["a.b"], ["a.b"], ["a.n.weight"])
    assert dict(found.layouts) == {"a.b": "out_in"}


@pytest.mark.parametrize(
    ("name", "base", "expected"),
    [
        ("blocks_0_q", "model.diffusion_model.blocks.0.q.weight", "blocks.0.q"),  # the base has a prefix
        ("text_model_layers_0_q", "layers.0.q.weight", "layers.0.q"),  # the adapter has one
        ("in_proj", "in_proj.in_proj_weight", "in_proj"),
        ("table", "table", "table"),  # a bare parameter
    ],
)
def test_a_prefix_of_one_side_is_no_obstacle(name, base, expected):
    assert list(with_dots(flattened(name), [[base]]).pairs) == [expected]


def test_the_layout_with_most_modules_decides():
    names = ("mid_a", "mid_b_c")
    found = with_dots(flattened(*names), [["mid.a.weight"], ["mid_a.weight", "mid.b_c.weight"], ["x.weight"]])
    assert list(found.pairs) == ["mid_a", "mid.b_c"]


def test_names_that_the_base_lacks_stay_as_they_are():
    assert list(with_dots(flattened("a_b", "c_d"), [["a.b.weight"]]).pairs) == ["a.b", "c_d"]
    assert list(with_dots(flattened("a_b"), [[]]).pairs) == ["a_b"]


def test_two_names_that_flatten_alike_are_refused_with_both():
    with pytest.raises(InputRefused, match=r"lora_unet_a_b_c may mean a\.b_c and a_b\.c: the names of the base"):
        with_dots(flattened("a_b_c"), [["a.b_c.weight", "a_b.c.weight", "other.weight"]])
    assert list(with_dots(flattened("other"), [["a.b_c.weight", "a_b.c.weight", "other.weight"]]).pairs) == ["other"]
