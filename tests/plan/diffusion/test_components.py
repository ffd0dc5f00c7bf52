"""Adapters for several models of a pipeline, and one model alone."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.lora import COMPONENTS, Adapter, component_name, split_component
from lora_export.plan.diffusion.components import (
    COMPONENT_OPTIONS,
    chosen_component,
    components_of,
    listed_components,
    of_component,
    only_component,
)
from support.small_layers import a_pair

ONES = np.ones(4, np.float32)


def adapter(*names: str, **fields) -> Adapter:
    pairs = {name: a_pair(4, 4) for name in names}
    spelling = {name: f"key of {name}" for name in names}
    return Adapter("x", "diffusers", pairs, layouts=dict.fromkeys(names, "out_in"), spelling=spelling, **fields)


BOTH = ("text_encoder/q", "denoiser/a.b", "denoiser/c")


def test_components_are_listed_in_their_order():
    assert components_of(adapter(*BOTH)) == ["denoiser", "text_encoder"]
    assert components_of(adapter("a", biases={"text_encoder_2/b": ONES}, added={"denoiser/n.weight": ONES})) == [
        *("", "denoiser", "text_encoder_2")
    ]


def test_a_slash_in_another_name_is_no_component():
    assert split_component("model/a") == ("", "model/a")
    assert split_component(component_name("denoiser", "a/b")) == ("denoiser", "a/b")
    assert component_name("", "a") == "a"


def test_the_part_of_a_component_has_plain_names():
    one = of_component(adapter(*BOTH, biases={"denoiser/c": ONES}, added={"text_encoder/n.weight": ONES}), "denoiser")
    assert (list(one.pairs), list(one.biases), list(one.added)) == (["a.b", "c"], ["c"], [])
    assert (dict(one.layouts), one.spelled("a.b")) == ({"a.b": "out_in", "c": "out_in"}, "key of denoiser/a.b")
    assert list(of_component(adapter(*BOTH), "denoiser", named=True).pairs) == ["denoiser/a.b", "denoiser/c"]


def test_the_only_component_needs_no_choice():
    plain = adapter("a", "b")
    assert only_component(plain) is plain
    assert list(only_component(adapter("denoiser/a")).pairs) == ["a"]


def test_several_components_need_a_choice():
    with pytest.raises(
        InputRefused, match="x has changes for several models of a pipeline: unet or transformer, text_"
    ):
        only_component(adapter(*BOTH))
    chosen = chosen_component(adapter(*BOTH), "unet")
    assert list(only_component(chosen).pairs) == ["a.b", "c"]
    assert chosen.notes == ("x: only its changes of unet are used, not those of text_encoder.",)
    assert chosen_component(adapter(*BOTH), "").pairs.keys() == set(BOTH)


def test_a_choice_of_the_only_component_is_no_news():
    assert chosen_component(adapter("denoiser/a"), "transformer").notes == ()


def test_a_component_that_an_adapter_lacks_is_refused():
    with pytest.raises(
        InputRefused, match="x has no changes for text_encoder_2\\. It has some for unet or transformer"
    ):
        chosen_component(adapter("denoiser/a"), "text_encoder_2")
    with pytest.raises(InputRefused, match="It has some for modules without a component"):
        chosen_component(adapter("a"), "unet")


def test_every_component_can_be_chosen():
    assert set(COMPONENT_OPTIONS.values()) == set(COMPONENTS)
    assert listed_components(["denoiser_2", "text_encoder_3"]) == "transformer_2, text_encoder_3 (T5)"
