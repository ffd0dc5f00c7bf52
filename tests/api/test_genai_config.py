"""`genai_config.json` of a graph with a cache: what the graph declares, and how the model chooses tokens."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from transformers import GenerationConfig, LlamaConfig

from lora_export.api.genai_config import genai_config

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
