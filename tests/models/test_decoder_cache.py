"""The cache of a decoder after a prompt: which kinds there are, how they vary, and what they are called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers as hf

from lora_export.errors import InputRefused
from lora_export.models.decoder_cache import cache_after_prompt, name_cache
from support.generators import DECODERS, LLAMA_LIKE


def after_prompt(name: str) -> Any:
    torch.manual_seed(0)
    return cache_after_prompt(DECODERS[name]().eval(), 2, 5)


def test_keys_grow_and_the_state_of_a_convolution_does_not() -> None:
    past = after_prompt("lfm2")
    assert past.keyword == "cache" and past.has_keys and not past.is_recurrent
    assert past.varying_axes == [(0,), (0, 2), (0, 2), (0,)]


def test_recurrent_state_is_told_from_that_of_a_convolution() -> None:
    past = after_prompt("mamba")
    assert past.is_recurrent and not past.has_keys
    assert past.varying_axes == [(0,)] * 4
    both = after_prompt("falcon_h1")  # attention and a state space in one layer
    assert both.is_recurrent and both.has_keys
    assert sorted(both.varying_axes) == [(0,)] * 6 + [(0, 2)] * 6


def test_window_that_slides_has_keys_of_full_length() -> None:
    past = after_prompt("gemma3")
    assert {type(layer).__name__ for layer in past.cache.layers} == {"DynamicLayer"}
    assert past.varying_axes == [(0, 2)] * 4


def test_tensors_get_their_names() -> None:
    tensors = ["0.conv_states.0", "0.conv_states.1", "0.recurrent_states.0", "2.keys", "2.values"]
    values = [
        [ir.Value(name=f"{side}put.cache.layers.{name}", shape=ir.Shape([2])) for name in tensors]
        for side in ("in", "out")
    ]
    values[0].append(ir.Value(name="input_ids", shape=ir.Shape([2])))
    program = ir.Model(ir.Graph(values[0], values[1], nodes=[], opset_imports={"": 20}), ir_version=10)
    own = {"past_conv.0": (0,), "past_conv.0.1": (0,), "past_recurrent.0": (0,)}
    assert name_cache(program) == own | dict.fromkeys(["past_key_values.2.key", "past_key_values.2.value"], (0, 2))
    assert [value.name for value in program.graph.inputs][-1] == "input_ids"
    assert [value.name for value in program.graph.outputs] == [
        *("present_conv.0", "present_conv.0.1", "present_recurrent.0", "present.2.key", "present.2.value"),
    ]


def test_cache_of_another_kind_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = DECODERS["llama"]().eval()
    layers = [SimpleNamespace()]
    monkeypatch.setattr(
        module, "forward", lambda cache=None, **_: SimpleNamespace(cache=SimpleNamespace(layers=layers))
    )
    with pytest.raises(InputRefused, match="LlamaForCausalLM has a cache of SimpleNamespace: a graph with a cache is"):
        cache_after_prompt(module, 2, 5)
    monkeypatch.setattr(module, "forward", lambda **_: None)
    with pytest.raises(InputRefused, match="takes no cache: it has none of cache, past_key_values"):
        cache_after_prompt(module, 2, 5)


def test_model_that_keeps_its_state_for_itself_is_refused() -> None:
    config = hf.RecurrentGemmaConfig(**LLAMA_LIKE, attention_window_size=8, block_types=("recurrent", "attention"))
    with pytest.raises(InputRefused, match="RecurrentGemmaForCausalLM returns no cache"):
        cache_after_prompt(hf.RecurrentGemmaForCausalLM(config).eval(), 2, 5)
