"""Models whose Python code a trace could not follow are exported, for other sizes than the traced ones."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from lora_export.models.export import to_onnx
from lora_export.models.tracing import tracing
from support.graphs import run

pytestmark = pytest.mark.exports

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}


def test_a_batch_varies_whose_len_a_model_takes() -> None:
    vision = {"input_size": 16, "patch_size": 8, "coordinate_size": 6, "shape_size": 4, "num_channels": 1}
    module = transformers.LayoutLMv3Model(transformers.LayoutLMv3Config(**TEXT, **vision)).eval()
    axes = {"pixel_values": {0: "batch"}}
    graph = to_onnx(module, {"pixel_values": torch.randn(2, 1, 16, 16)}, axes=axes)
    pixels = torch.randn(5, 1, 16, 16)
    with torch.no_grad():
        expected = module(pixel_values=pixels).last_hidden_state
    found = run(graph, pixel_values=pixels.numpy())["last_hidden_state"]
    torch.testing.assert_close(torch.from_numpy(found), expected)
    assert "len" not in vars(inspect.getmodule(type(module)))


def test_all_experts_are_visited() -> None:
    """The traced tokens are equal, and chose one expert."""
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 60}
    config = transformers.SwitchTransformersConfig(
        **sizes, num_experts=3, expert_capacity=4, num_sparse_encoder_layers=1
    )
    module = transformers.SwitchTransformersEncoderModel(config).eval()
    ones = torch.ones((2, 3), dtype=torch.long)
    axes = {0: "batch", 1: "sequence"}
    names = ("input_ids", "attention_mask")
    graph = to_onnx(module, {name: ones.clone() for name in names}, axes=dict.fromkeys(names, axes))
    inputs = {"input_ids": torch.randint(60, (3, 7)), "attention_mask": torch.ones((3, 7), dtype=torch.long)}
    with torch.no_grad():
        expected = module(**inputs).last_hidden_state
    found = run(graph, **{name: value.numpy() for name, value in inputs.items()})["last_hidden_state"]
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_a_part_of_this_dtype_stays_as_it_is() -> None:
    with tracing(nn.Linear(1, 1)):
        linear = nn.Linear(1, 1)
        before = linear.weight
        assert linear.to(torch.float32).weight is before
        assert linear.to(torch.float64).weight.dtype == torch.float64
