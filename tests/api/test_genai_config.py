"""`genai_config.json` of a graph with a cache: what the graph declares, and how the model chooses tokens."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
from transformers import BloomConfig, GenerationConfig, LlamaConfig, MptConfig

from lora_export.api import genai_config as genai_config_module
from lora_export.api.genai_config import ANY_LENGTH, genai_config

CONFIG = LlamaConfig(vocab_size=60, hidden_size=32, num_attention_heads=4, max_position_embeddings=99)


def a_graph(features: tuple[int, ...], names: tuple[str, ...] = ("input_ids", "attention_mask")) -> ir.Model:
    tokens = [ir.Value(name=name, shape=ir.Shape(["b", "s"])) for name in names]
    cache = [
        ir.Value(name=f"past_key_values.{number}.{part}", shape=ir.Shape(["b", 2, "p", size]))
        for number, size in enumerate(features)
        for part in ("key", "value")
    ]
    return ir.Model(ir.Graph([*tokens, *cache], [], nodes=[], opset_imports={"": 20}), ir_version=10)


def config_of(graph: ir.Model, **generation: Any) -> dict[str, Any]:
    config = genai_config(graph, CONFIG, GenerationConfig(**generation), "m.onnx")
    assert config is not None
    return config


def test_sizes_are_those_of_the_graph_and_the_config() -> None:
    model = config_of(a_graph((8, 8, 8)))["model"]
    assert model["context_length"] == 99
    decoder = model["decoder"]
    assert decoder["filename"] == "m.onnx"
    assert [decoder[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_size", "hidden_size")] == [
        *(3, 2, 8, 32)
    ]


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (MptConfig(vocab_size=60, d_model=32, n_heads=4, max_seq_len=77), 77),
        (BloomConfig(vocab_size=60, hidden_size=32, n_head=4, seq_length=55), 55),
        (BloomConfig(vocab_size=60, hidden_size=32, n_head=4), ANY_LENGTH),
    ],
)
def test_a_length_is_stated_for_every_model(config: Any, length: int) -> None:
    """onnxruntime-genai reads no null, and refuses a length of 0."""
    found = genai_config(a_graph((8,)), config, GenerationConfig(), "m.onnx")
    assert found is not None and found["model"]["context_length"] == found["search"]["max_length"] == length


def test_only_inputs_of_the_graph_are_named() -> None:
    assert "position_ids" not in config_of(a_graph((8,)))["model"]["decoder"]["inputs"]
    names = ("input_ids", "attention_mask", "position_ids")
    assert config_of(a_graph((8,), names))["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"


def test_tokens_and_the_choice_of_tokens_are_those_of_the_generation_config() -> None:
    config = config_of(a_graph((8,)), eos_token_id=[2, 7], pad_token_id=0, do_sample=True, top_p=0.7)
    assert config["model"]["eos_token_id"] == [2, 7]
    assert config["model"]["pad_token_id"] == 0
    assert "bos_token_id" not in config["model"]  # None is none, and no token 0
    assert (config["search"]["do_sample"], config["search"]["top_p"], config["search"]["top_k"]) == (True, 0.7, 50)


def test_cache_of_different_sizes_has_no_config() -> None:
    assert genai_config(a_graph((8, 16)), CONFIG, GenerationConfig(), "m.onnx") is None


@pytest.mark.parametrize(("longest", "shares"), [(99, True), (1 << 24, True), ((1 << 24) + 1, False)])
def test_past_and_present_share_a_buffer_that_is_not_too_large(
    longest: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(genai_config_module, "takes_shared_buffer", lambda _: True)
    config = LlamaConfig(vocab_size=60, hidden_size=32, num_attention_heads=4, max_position_embeddings=longest)
    graph = a_graph((8,))  # a key and a value of 2 x 8 numbers of 4 bytes: 128 bytes for each token
    found = [genai_config(graph, config, GenerationConfig(), "m.onnx", may_share=may) for may in (False, True)]
    assert [own and own["search"]["past_present_share_buffer"] for own in found] == [False, shares]


def test_graph_that_derives_its_positions_from_the_past_shares_no_buffer() -> None:
    config = genai_config(a_graph((8,)), CONFIG, GenerationConfig(), "m.onnx", may_share=True)
    assert config is not None and config["search"]["past_present_share_buffer"] is False


def with_states(*names: str) -> ir.Model:
    graph = a_graph((8,), ("input_ids", "attention_mask"))
    for value in graph.graph.inputs:
        value.name = (value.name or "").replace(".0.", ".1.")
    graph.graph.inputs.extend(ir.Value(name=name, shape=ir.Shape(["b", 32, 4])) for name in names)
    return graph


def test_layers_of_short_convolutions_are_listed() -> None:
    model = config_of(with_states("past_conv.0", "past_conv.2"))["model"]
    assert model["type"] == "lfm2"
    decoder = model["decoder"]
    assert (decoder["num_hidden_layers"], decoder["conv_cache_size"]) == (3, 4)
    assert decoder["layer_types"] == ["conv", "full_attention", "conv"]
    assert decoder["inputs"]["past_conv_names"] == "past_conv.%d"
    assert decoder["outputs"]["present_conv_names"] == "present_conv.%d"
    plain = config_of(a_graph((8,)))["model"]
    assert plain["type"] == "decoder" and "layer_types" not in plain["decoder"]


def test_graph_that_takes_one_token_has_no_config() -> None:
    assert genai_config(with_states("past_conv.0", "past_recurrent.0"), CONFIG, GenerationConfig(), "m.onnx") is None
