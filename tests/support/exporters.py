"""What several tests share: exporters."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from lora_export import formats, plan
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.merge.fold import fold
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import LoraPair
from lora_export.plan import Layout
from lora_export.weights.checkpoint import open_checkpoint
from support.graphs import Arrays, an_adapter, eager, with_changes
from support.handmade import peft_adapter

WORDS = 50

HEAD = 16  # features of the Llama's attention heads


def a_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=40,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def a_gpt2() -> nn.Module:
    """Conv1D, and a head that is tied to the embedding."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=40))


def a_bert() -> nn.Module:
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": a_llama, "gpt2": a_gpt2, "bert": a_bert}


@functools.cache
def module_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    return module


@functools.cache
def text(batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * length)
    ids = torch.randint(4, WORDS, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Logits(nn.Module):
    """For the TorchScript exporter, which takes its inputs in order; its names gain `model.` in front."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


DYNAMIC = {0: "batch", 1: "sequence"}


def torchscript(name: str, path: Path, dtype: torch.dtype = torch.float32) -> None:
    module = Logits(copy.deepcopy(module_of(name))).to(dtype).eval()
    torch.onnx.export(
        module, tuple(text().values()), path, dynamo=False, opset_version=17, input_names=list(text()),
        output_names=["logits"], dynamic_axes=dict.fromkeys(text(), DYNAMIC),
    )  # fmt: skip


def dynamo(name: str, path: Path, *, optimize: bool = True) -> None:
    shapes = {key: {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")} for key in text()}
    program = torch.onnx.export(
        module_of(name), (), kwargs=dict(text()), dynamo=True, optimize=optimize, dynamic_shapes=shapes, verbose=False
    )
    program.save(path)


def raw_dynamo(name: str, path: Path) -> None:
    dynamo(name, path, optimize=False)


def transformers_exporter(name: str, path: Path, fusions: str | None = None) -> None:
    exporters = pytest.importorskip("transformers.exporters", reason="transformers' exporters need transformers 5.24")
    configs = importlib.import_module("transformers.exporters.configs")
    config = configs.OnnxConfig(dynamic=True, ort_fusions=fusions)
    exported = exporters.OnnxExporter().export(module_of(name), dict(text()), config)
    exporters.OnnxExporter.save_program(exported.program, path)


def transformers_fused(name: str, path: Path) -> None:
    transformers_exporter(name, path, "cpu")


TASKS = {"llama": "text-generation", "gpt2": "text-generation", "bert": "text-classification"}

OPTIMUM = "from optimum.exporters.onnx import main_export; import sys; main_export(*sys.argv[1:3], task=sys.argv[3])"


def optimum(name: str, path: Path) -> None:
    """In an environment of its own: optimum-onnx wants a transformers older than the rest of the tests."""
    python = os.environ.get("OPTIMUM_PYTHON")
    if python is None:
        pytest.skip("OPTIMUM_PYTHON names no interpreter that has optimum-onnx: `make test-optimum` sets one up")
    save_tokenizer(base_of(name))
    line = [python, "-c", OPTIMUM, base_of(name), path.parent, TASKS[name]]
    subprocess.run(line, check=True, capture_output=True, cwd=path.parent)


EXPORTERS: dict[str, Callable[[str, Path], None]] = {
    "torchscript": torchscript,
    "dynamo": dynamo,
    "dynamo, not optimised": raw_dynamo,
    "transformers": transformers_exporter,
    "transformers, fused": transformers_fused,
    "optimum": optimum,
}


def as_it_is(_: Path, __: Path) -> None:
    """Nothing."""


def optimised(level: str) -> Callable[[Path, Path], None]:
    def optimise(source: Path, target: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return optimise


def stripped(source: Path, target: Path) -> None:
    """No metadata, and no name that says anything."""
    model = ir.load(source)
    for number, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"w{number}"
        value.metadata_props.clear()
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
        node.metadata_props.clear()
    ir.save(model, target)


def slimmed(source: Path, target: Path) -> None:
    onnxslim = pytest.importorskip("onnxslim", reason="onnxslim is not installed")
    onnx.save(onnxslim.slim(onnx.load(source)), target)


def simplified(source: Path, target: Path) -> None:
    onnxsim = pytest.importorskip("onnxsim", reason="onnxsim is not installed")
    simple, well = onnxsim.simplify(onnx.load(source))
    assert well
    onnx.save(simple, target)


AFTERWARDS: dict[str, Callable[[Path, Path], None]] = {
    "": as_it_is,
    "basic": optimised("BASIC"),
    "extended": optimised("EXTENDED"),
    "stripped": stripped,
    "onnxslim": slimmed,
    "onnxsim": simplified,
}


def save_tokenizer(folder: Path) -> None:
    words = models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0", eos_token="w2")
    tokenizer.save_pretrained(folder)


def linear_weights(module: nn.Module) -> dict[str, NDArray[Any]]:
    """Every linear layer's weight in the (out, in) view."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            weight = layer.weight.detach().numpy()
            found[f"{name}.weight"] = weight.T if isinstance(layer, Conv1D) else weight
    return found


@functools.cache
def base_of(name: str) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp()) / name
    module_of(name).save_pretrained(folder)
    return folder


def adapter_for(found: Sites, name: str) -> tuple[Any, nn.Module]:
    """Random pairs on every named linear layer, and the module with W + ΔW in fp64 rounded to fp32."""
    rng = np.random.default_rng(0)
    module = module_of(name)
    pairs, changes = {}, {}
    for weight, (out, inner) in {
        spec.name: spec.matrix for spec in found.specs if spec.layout in (Layout.OUT_IN, Layout.IN_OUT)
    }.items():
        pair = LoraPair(a=rng.normal(size=(3, inner)) * 0.3, b=rng.normal(size=(out, 3)) * 0.3, scale=0.5)
        pairs[weight.removesuffix(".weight")] = pair
        change = 0.5 * pair.b.astype(np.float64) @ pair.a.astype(np.float64)
        turned = isinstance(module.get_submodule(weight.removesuffix(".weight")), Conv1D)
        changes[weight] = change.T if turned else change
    return an_adapter(pairs), with_changes(module, changes)


def answers(path: Path, feeds: dict[str, Tensor]) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays = {key: value.numpy() for key, value in feeds.items()}
    batch, length = feeds["input_ids"].shape
    for wanted in session.get_inputs():
        if wanted.name == "position_ids":
            arrays[wanted.name] = np.tile(np.arange(length), (batch, 1))
        elif wanted.name == "token_type_ids":
            arrays[wanted.name] = np.zeros((batch, length), np.int64)
        elif wanted.name not in arrays:  # an empty cache
            shape = [size if isinstance(size, int) else HEAD if size == "kv_cache_dim" else 0 for size in wanted.shape]
            arrays[wanted.name] = np.zeros([batch, *shape[1:]], np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, arrays), strict=True))


def logits(arrays: Arrays) -> NDArray[Any]:
    return arrays.get("logits", next(iter(arrays.values())))


def assert_folding_is_pytorchs(path: Path, name: str, folder: Path, *, tolerance: float = 2e-5) -> None:
    model = load_graph(path)
    found = find_sites(model, open_checkpoint(base_of(name)))
    adapter, reference = adapter_for(found, name)
    assert adapter.pairs
    fold(model, found, plan.make([adapter], found.specs))
    folder.mkdir()
    (*_, folded) = save_graph(model, folder, "folded.onnx")
    for batch, length in [(1, 5), (3, 11)]:
        feeds = text(batch, length)
        expected = eager(reference, feeds)["logits"]
        np.testing.assert_allclose(logits(answers(folded, feeds)), expected, rtol=tolerance, atol=tolerance)
        assert np.abs(expected - logits(answers(path, feeds))).max() > 100 * tolerance  # the adapter is seen


def held(value: ir.Value) -> bytes:
    assert value.const_value is not None
    return value.const_value.tobytes()


def an_adapter_of(name: str, folder: Path) -> Path:
    """Pairs for every linear layer of one of the models that `test_exporters` exports, but for the head."""
    rng = np.random.default_rng(0)
    weights = {
        weight.removesuffix(".weight"): held.shape
        for weight, held in linear_weights(module_of(name)).items()
        if weight != "lm_head.weight"
    }
    return peft_adapter(
        folder,
        {
            module: (0.3 * rng.standard_normal((3, inner)), 0.3 * rng.standard_normal((out, 3)))
            for module, (out, inner) in weights.items()
        },
    )


def assert_is_the_models(path: Path, name: str, adapter: Path) -> None:
    """The graph computes what PyTorch computes with W + ΔW, in a case of its own."""
    changes = {}
    for module, pair in formats.load(adapter).pairs.items():
        change = pair.scale * pair.b.astype(np.float64) @ pair.a
        linear = isinstance(module_of(name).get_submodule(module), torch.nn.Linear)
        changes[f"{module}.weight"] = change if linear else change.T
    expected = eager(with_changes(module_of(name), changes), text(3, 11))["logits"]
    given = logits(answers(path, text(3, 11)))
    np.testing.assert_allclose(given, expected, rtol=5e-5, atol=5e-5)
    assert np.abs(expected - eager(module_of(name), text(3, 11))["logits"]).max() > 1e-2
