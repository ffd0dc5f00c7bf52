"""What several tests share: decoders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from lora_export import layers, plan
from lora_export.lora import Adapter
from lora_export.models import model

WORDS, FEATURES = 11, 4

# What it keeps of each token is its row of the table; what it answers, the sum of all rows so far, times a matrix.
SUMS = """
<ir_version: 8, opset_import: ["" : 17]>
sums (int64[batch, tokens] input_ids, int64[batch, total] attention_mask, float[batch, 1, past, 4] past_key)
=> (float[batch, tokens, 3] logits, float[batch, 1, total, 4] present_key)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64 axis = {2},
 int64[1] last = {-1}, int64[1] end = {9223372036854775807}> {
  many = Shape <start = 1, end = 2> (input_ids)
  rows = Gather <axis = 0> (table, input_ids)
  here = Unsqueeze (rows, one)
  present_key = Concat <axis = 2> (past_key, here)
  seen = Cast <to = 1> (attention_mask)
  aside = Unsqueeze (seen, one)
  mask = Unsqueeze (aside, three)
  kept = Mul (present_key, mask)
  sums = CumSum (kept, axis)
  before = Shape <start = 2, end = 3> (past_key)
  now = Slice (sums, before, end, two)
  flat = Squeeze (now, one)
  logits = MatMul (flat, turned)
}
"""

# It takes one token, and returns the sum of all numbers so far, which is its state.
RUNNING_SUM = """
<ir_version: 8, opset_import: ["" : 17]>
running (int64[batch, 1] input_ids, float[batch, 1, 1] past_state)
=> (float[batch, 1, 1] logits, float[batch, 1, 1] present_state)
<int64[1] two = {2}> {
  number = Cast <to = 1> (input_ids)
  row = Unsqueeze (number, two)
  present_state = Add (past_state, row)
  logits = Identity (present_state)
}
"""

# What exporters call them, which ONNX's text form cannot say.
CALLED = {"past_key": "past_key_values.0.key", "present_key": "present.0.key"}
CALLED |= {"past_state": "past_recurrent.0", "present_state": "present_recurrent.0"}


def a_graph(
    path: Path, base: model.Model, change: tuple[str, str] = ("", ""), *, adapter: Adapter | None = None
) -> Path:
    """The graph of `sums`, with the adapter folded in, and with some of its text changed."""
    module = copy.deepcopy(base.module)
    if adapter is not None:
        layers.fold(module, plan.make([adapter], layers.specs(module)))
    assert change[0] in SUMS
    graph = _parsed(SUMS.replace(*change))
    weights = {"table": module.table.weight.detach().numpy(), "turned": module.dense.weight.detach().numpy().T.copy()}
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(graph, path)
    return path


def a_graph_with_a_state(path: Path) -> Path:
    """The graph of RUNNING_SUM."""
    onnx.save(_parsed(RUNNING_SUM), path)
    return path


def _parsed(text: str) -> onnx.ModelProto:
    graph = onnx.parser.parse_model(text)
    for node in graph.graph.node:
        node.input[:] = [CALLED.get(name, name) for name in node.input]
        node.output[:] = [CALLED.get(name, name) for name in node.output]
    for value in (*graph.graph.input, *graph.graph.output):
        value.name = CALLED.get(value.name, value.name)
    return graph


class Cached(nn.Module):
    """A causal model, its cache as tensors that go in and come out."""

    def __init__(self, causal: LlamaForCausalLM) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Any) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(config=self.causal.config)
        for number, (key, value) in enumerate(past):
            cache.update(key, value, number)
        answer = self.causal(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return (answer.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


def export_with_cache(module: LlamaForCausalLM, path: Path) -> None:
    places = [f"{number}.{part}" for number in range(2) for part in ("key", "value")]
    varies = torch.export.Dim.DYNAMIC
    tokens, cache = {0: varies, 1: varies}, {0: varies, 2: varies}
    past = [(torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, 16)) for _ in range(2)]
    torch.onnx.export(
        Cached(module).eval(),
        (torch.randint(4, 50, (2, 3)), torch.ones(2, 8, dtype=torch.long), past),
        path,
        dynamo=True,
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{place}" for place in places)],
        output_names=["logits", *(f"present.{place}" for place in places)],
        dynamic_shapes=(tokens, tokens, [(cache, cache)] * 2),
        verbose=False,
    )
