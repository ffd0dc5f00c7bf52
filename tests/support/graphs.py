"""Graphs for tests: from text, or exported once a session from small modules."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lora_export import layers, plan
from lora_export.graph.exporter_metadata import FOLDED_FROM, NAME_SCOPES
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.lora import Adapter, LoraPair
from lora_export.models import export
from lora_export.models.model import Axes
from lora_export.plan import Plan, TensorSpec

Arrays = dict[str, NDArray[Any]]


def a_graph(body: str, *, modules: Mapping[str, str] | None = None, **origins: str) -> ir.Model:
    """A model from ONNX's text, dotted names unquoted.

    `modules` maps nodes to the modules they were traced in, `origins` values to what they were folded from.
    """
    quoted = re.sub(r"\b[a-z]\w*(\.\w+)+", r'"\g<0>"', body)
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]>\n{quoted}')
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if modules and node.name in modules:
            node.metadata_props[NAME_SCOPES] = repr(["", modules[node.name], "linear"])
    for name, origin in origins.items():
        model.graph.initializers[name].metadata_props[FOLDED_FROM] = repr([origin])
    return model


def run(model: ir.Model, **feeds: Any) -> Arrays:
    """What onnxruntime computes on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(ir.external_data.load_to_model(model.clone())).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def an_adapter(pairs: Mapping[str, LoraPair], *, name: str = "default", **fields: Any) -> Adapter:
    return Adapter(name=name, format="test", pairs=pairs, **fields)


def planned(model: ir.Model, *adapters: Adapter, **options: Any) -> tuple[Sites, Plan]:
    found = find_sites(model)
    return found, plan.make(adapters, found.specs, **options)


def stored(model: ir.Model, name: str) -> NDArray[Any]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def contents(model: ir.Model) -> dict[str, bytes]:
    return {name: stored(model, name).tobytes() for name in model.graph.initializers}


def linear_specs(model: ir.Model) -> list[TensorSpec]:
    """The weights beside which branches can stand."""
    found = find_sites(model)
    return [spec for spec in found.specs if not any(site.obstacle for site in found.by_name[spec.name])]


def quantised(
    model: ir.Model, *, bits: int = 4, block: int = 32, symmetric: bool = True, as_pairs: bool = False
) -> ir.Model:
    """The graph with its MatMul weights quantised by onnxruntime's tool, to MatMulNBits or DequantizeLinear."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.quant_utils import QuantFormat

    tool = MatMulNBitsQuantizer(
        ir.to_proto(model), block_size=block, is_symmetric=symmetric, bits=bits,
        quant_format=QuantFormat.QDQ if as_pairs else QuantFormat.QOperator,
    )  # fmt: skip
    tool.process()
    return ir.from_proto(tool.model.model)


# --- modules, exported ---------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two-dimensional inputs: its linear layers become Gemm nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.down = nn.Linear(8, 3)
        nn.init.zeros_(self.down.bias)
        self.norm.running_var.fill_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


class Encoder(nn.Module):
    """A convolution before `nn.TransformerEncoder`, whose two layers start out equal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 16, 3, padding=1)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.conv(x).transpose(1, 2))
        return {"scores": self.head(hidden), "pooled": hidden.mean(1)}


def a_bert() -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def a_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=40, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


TEXT = {0: "batch", 1: "sequence"}
AXES: dict[str, Axes] = {
    "mlp": {"x": {0: "batch"}},
    "encoder": {"x": {0: "batch", 2: "sequence"}},
    "bert": {"input_ids": TEXT, "attention_mask": TEXT, "token_type_ids": TEXT},
    "llama": {"input_ids": TEXT, "attention_mask": TEXT},
}
MAKERS = {"mlp": Mlp, "encoder": Encoder, "bert": a_bert, "llama": a_llama}
LLAMA = pytest.param("llama", marks=pytest.mark.slow)  # its export takes as long as the others together
EVERY_MODEL = pytest.mark.parametrize("name", ["mlp", "encoder", "bert", LLAMA])


@dataclass(frozen=True, eq=False)
class Exported:
    """A module with its graph; `graph` is the caller's own, the module is everybody's."""

    module: nn.Module
    graph: ir.Model
    axes: Axes


def inputs(name: str, batch: int = 2, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    if name == "mlp":
        return {"x": torch.randn(batch, 4)}
    if name == "encoder":
        return {"x": torch.randn(batch, 3, length)}
    ids = torch.randint(0, 50, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1::2, -2:] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    return made | {"token_type_ids": (ids + 1) % 2} if name == "bert" else made


@functools.cache
def _exported(name: str) -> Exported:
    torch.manual_seed(0)
    module = MAKERS[name]().eval()
    return Exported(module, export.to_onnx(module, inputs(name), axes=AXES[name]), AXES[name])


def exported(name: str) -> Exported:
    """The module exported at 2 rows of 7; a fresh copy of the graph."""
    made = _exported(name)
    return Exported(made.module, made.graph.clone(), made.axes)


def eager(module: nn.Module, feeds: Mapping[str, Tensor]) -> Arrays:
    with torch.no_grad():
        outputs = module(**feeds)
    if isinstance(outputs, Tensor):
        outputs = {"output_0": outputs}
    return {name: value.numpy() for name, value in outputs.items() if isinstance(value, Tensor)}


def attached(module: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy with the adapter as branches in PyTorch; tied weights are untied first."""
    steps = plan.make([adapter], layers.specs(module))
    adapted = with_changes(module, {step.weight: np.zeros(()) for step in steps.low_rank})
    layers.attach(adapted, steps)
    return adapted


def with_changes(module: nn.Module, changes: Mapping[str, NDArray[Any]]) -> nn.Module:
    """A plain copy whose parameters are W + ΔW, added in NumPy's fp64; tied weights are untied first."""
    plain = copy.deepcopy(module)
    for name, change in changes.items():
        owner, _, attribute = name.rpartition(".")
        holder = plain.get_submodule(owner)
        weight = getattr(holder, attribute).detach().double().numpy()
        setattr(holder, attribute, nn.Parameter(torch.from_numpy((weight + change).astype(np.float32))))
    return plain
