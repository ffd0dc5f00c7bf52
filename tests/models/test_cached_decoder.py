"""A decoder with its cache as one graph: for a prompt and for every token after it, padded or not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from torch import nn

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.models.cached_decoder import (
    cache_after_prompt,
    cache_as_remedy,
    counts_by_mask,
    name_cache,
    refuse_other_than_decoder,
    takes_one_token,
    takes_positions,
)
from lora_export.models.fused_operators import fuse_operators
from lora_export.runtime.kv_cache import CacheRunner, with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from support.generators import DECODERS, LLAMA_LIKE, STEPWISE, VOCABULARY, assert_same_logits, exported_decoder
from support.slow import slow_but

RECURRENT = {**LLAMA_LIKE, "attention_window_size": 8, "block_types": ("recurrent", "attention")}


@pytest.mark.parametrize("name", slow_but(["opt"], sorted(DECODERS.keys() - {*STEPWISE})))
def test_graph_computes_the_logits_of_every_position(name: str, tmp_path: Path) -> None:
    module, program = exported_decoder(name)
    *_, path = save_graph(program, tmp_path, "model.onnx")
    runner = with_cache(OnnxRunner(path))
    assert isinstance(runner, CacheRunner)
    assert runner.takes_padding
    assert_same_logits(runner, module)


def test_model_that_finds_positions_by_the_mask_takes_none() -> None:
    _, program = exported_decoder("opt")
    assert {"attention_mask"} == {value.name for value in program.graph.inputs} & {"attention_mask", "position_ids"}


def test_model_told_to_make_no_cache_is_exported_with_one() -> None:
    module, program = exported_decoder("opt")  # its config says so
    assert len(program.graph.outputs) == 1 + 2
    assert module.config.use_cache is False


@pytest.mark.slow
def test_names_and_axes_are_those_of_genai_and_optimum() -> None:
    module, program = exported_decoder("llama")
    graph = ir.to_proto(program).graph
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    names = [f"{number}.{part}" for number in range(2) for part in ("key", "value")]
    size = module.config.head_dim
    cache: dict[str, list[object]] = {f"past_key_values.{name}": ["batch", 2, "past", size] for name in names}
    cache |= {f"present.{name}": ["batch", 2, "past + sequence", size] for name in names}
    tokens = ["batch", "sequence"]
    assert shapes == {
        "input_ids": tokens,
        "attention_mask": ["batch", "total"],
        "position_ids": tokens,
        **cache,
        "logits": [*tokens, VOCABULARY],
    }


@pytest.mark.slow
def test_graph_with_a_recurrent_state_takes_one_token_at_once(tmp_path: Path) -> None:
    module, program = exported_decoder("mamba2")
    *_, path = save_graph(program, tmp_path, "model.onnx")
    states = [f"{kind}.{layer}" for layer in range(2) for kind in ("conv", "recurrent")]
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["input_ids", *(f"past_{name}" for name in states)]
    assert [value.name for value in graph.output] == ["logits", *(f"present_{name}" for name in states)]
    fuse_operators(program, "cpu")
    assert "SkipSimplifiedLayerNormalization" in {node.op_type for node in program.graph}
    *_, fused = save_graph(program, tmp_path, "fused.onnx")
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (3, 12))
    with torch.no_grad():
        expected = module(input_ids=torch.tensor(ids)).logits.numpy()
    assert np.abs(expected).max() > 0.1
    for file in (path, fused):
        runner = with_cache(OnnxRunner(file))
        assert isinstance(runner, CacheRunner) and runner.tokens_at_once == 1
        np.testing.assert_allclose(runner.run({"input_ids": ids})["logits"], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("tokens", "mask"), [(1, "past + 1"), ("sequence", 1)])
def test_the_axis_of_tokens_alone_decides_whether_a_graph_takes_one(tokens: Any, mask: Any) -> None:
    sizes = {"input_ids": tokens, "attention_mask": mask}
    inputs = [ir.Value(name=name, shape=ir.Shape(["batch", size])) for name, size in sizes.items()]
    program = ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 20}), ir_version=10)
    assert takes_one_token(program) == (tokens == 1)


def test_what_is_no_decoder_of_texts_is_refused() -> None:
    encoder = hf.BertModel(hf.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    both = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1))
    with pytest.raises(InputRefused, match="base: BertModel generates no texts"):
        refuse_other_than_decoder(encoder, "base")
    with pytest.raises(InputRefused, match="T5ForConditionalGeneration has an encoder"):
        refuse_other_than_decoder(both, "base")
    with pytest.raises(InputRefused, match="is made of a Hugging Face model, not of a Linear"):
        refuse_other_than_decoder(torch.nn.Linear(2, 2), "base")
    refuse_other_than_decoder(DECODERS["llama"](), "base")


@pytest.mark.parametrize(("name", "by_mask"), [("llama", False), ("gpt2", False), ("opt", True)])
def test_models_that_count_the_ones_of_the_mask_are_found(name: str, by_mask: bool) -> None:
    module = DECODERS[name]().eval()
    assert takes_positions(module)
    assert counts_by_mask(module) is by_mask


def test_models_without_positions_are_known() -> None:
    assert not takes_positions(nn.Linear(2, 2)) and not takes_positions(DECODERS["bloom"]())


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
        *("present_conv.0", "present_conv.0.1", "present_recurrent.0", "present.2.key", "present.2.value")
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
    config = hf.RecurrentGemmaConfig(**RECURRENT)
    with pytest.raises(InputRefused, match="RecurrentGemmaForCausalLM returns no cache"):
        cache_after_prompt(hf.RecurrentGemmaForCausalLM(config).eval(), 2, 5)


@pytest.mark.parametrize(
    ("name", "fields", "has_way"),
    [
        ("Mamba", {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, True),
        ("RecurrentGemma", RECURRENT, False),
        ("Rwkv", {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}, False),
        ("Llama", LLAMA_LIKE, False),  # keeps no state
    ],
)
def test_a_refusal_names_the_cache_where_a_graph_may_have_it(name: str, fields: dict[str, Any], has_way: bool) -> None:
    module = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**fields)).eval()
    with pytest.raises(RuntimeRefused, match="a loop") as refused, cache_as_remedy(module):
        raise RuntimeRefused("a loop")
    assert ("is exported token by token: with_cache=True" in str(refused.value)) is has_way
