"""Models, exporters and graph optimisers whose combinations are tested. For the tests of exported graphs."""

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
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from lora_export import formats, plan
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import LoraPair
from lora_export.plan import Layout
from lora_export.weights.checkpoint import open_checkpoint
from support.exported_models import eager, with_changes
from support.graphs import Arrays, an_adapter
from support.handmade import peft_adapter
from support.tiny_models import tiny_bert, tiny_gpt2, tiny_llama

VOCABULARY_SIZE = 50

HEAD_SIZE = 16  # features of an attention head of the Llama


SIZES = {"vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
SIZES |= {"max_position_embeddings": 40}


def a_llama() -> nn.Module:
    return tiny_llama(**SIZES, num_key_value_heads=1)


def a_gpt2() -> nn.Module:
    """A model with Conv1D layers and a head that is tied to the embedding."""
    return tiny_gpt2(vocab_size=VOCABULARY_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=40)


def a_bert() -> nn.Module:
    return tiny_bert(**SIZES, num_attention_heads=4)


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": a_llama, "gpt2": a_gpt2, "bert": a_bert}


@functools.cache
def model_of(name: str) -> nn.Module:
    """The model of this name. All tests share it."""
    module = MODELS[name]()
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    return module


@functools.cache
def token_inputs(batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Random tokens and an attention mask."""
    generator = torch.Generator().manual_seed(batch * length)
    ids = torch.randint(4, VOCABULARY_SIZE, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Logits(nn.Module):
    """A model for the TorchScript exporter, which passes inputs by position. The prefix of its weights is `model.`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


DYNAMIC = {0: "batch", 1: "sequence"}


def torchscript(name: str, path: Path, dtype: torch.dtype = torch.float32) -> None:
    module = Logits(copy.deepcopy(model_of(name))).to(dtype).eval()
    torch.onnx.export(
        module, tuple(token_inputs().values()), path, dynamo=False, opset_version=17, input_names=list(token_inputs()),
        output_names=["logits"], dynamic_axes=dict.fromkeys(token_inputs(), DYNAMIC),
    )  # fmt: skip


def dynamo(name: str, path: Path, *, optimize: bool = True) -> None:
    shapes = {key: {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")} for key in token_inputs()}
    program = torch.onnx.export(
        model_of(name),
        (),
        kwargs=dict(token_inputs()),
        dynamo=True,
        optimize=optimize,
        dynamic_shapes=shapes,
        verbose=False,
    )
    program.save(path)


def raw_dynamo(name: str, path: Path) -> None:
    dynamo(name, path, optimize=False)


def transformers_exporter(name: str, path: Path, fusions: str | None = None) -> None:
    exporters = pytest.importorskip("transformers.exporters", reason="transformers' exporters need transformers 5.24")
    configs = importlib.import_module("transformers.exporters.configs")
    config = configs.OnnxConfig(dynamic=True, ort_fusions=fusions)
    exported = exporters.OnnxExporter().export(model_of(name), dict(token_inputs()), config)
    exporters.OnnxExporter.save_program(exported.program, path)


def transformers_fused(name: str, path: Path) -> None:
    transformers_exporter(name, path, "cpu")


TASKS = {"llama": "text-generation", "gpt2": "text-generation", "bert": "text-classification"}

# A task is found for a class; for a folder it must be given.
OPTIMUM = """
import json, pathlib, sys, transformers
from optimum.exporters.onnx import main_export
from optimum.exporters.tasks import TasksManager
model, target, *tasks = sys.argv[1:]
config = json.loads(pathlib.Path(model, "config.json").read_text())
task = tasks[0] if tasks else TasksManager.infer_task_from_model(getattr(transformers, config["architectures"][0]))
with_past = task + "-with-past"
possible = TasksManager.get_supported_tasks_for_model_type(config["model_type"].replace("_", "-"), "onnx")
task = with_past if not tasks and with_past in possible else task
main_export(model, target, task=task, no_post_process=not tasks)  # which adds a graph of both decoders
"""


def optimum_python() -> str:
    """The interpreter of a separate environment: optimum-onnx needs an older transformers than all other tests."""
    python = os.environ.get("OPTIMUM_PYTHON")
    if python is None:
        pytest.skip("OPTIMUM_PYTHON names no interpreter that has optimum-onnx: `make test-optimum` sets one up")
    return python


def optimum(name: str, path: Path) -> None:
    save_tokenizer(checkpoint_of(name))
    export_by_optimum(checkpoint_of(name), path.parent, TASKS[name])


def export_by_optimum(checkpoint: Path, target: Path, task: str | None = None) -> None:
    """Write optimum's graphs of a checkpoint into a folder, which may exist.

    Without a task it is that of the checkpoint's class, with a key/value cache where optimum has one for it.
    """
    target.mkdir(exist_ok=True)
    line = [optimum_python(), "-c", OPTIMUM, checkpoint, target, *([task] if task else [])]
    subprocess.run(line, check=True, capture_output=True, cwd=target)


EXPORTERS: dict[str, Callable[[str, Path], None]] = {
    "torchscript": torchscript,
    "dynamo": dynamo,
    "dynamo, not optimised": raw_dynamo,
    "transformers": transformers_exporter,
    "transformers, fused": transformers_fused,
    "optimum": optimum,
}


def unchanged(_: Path, __: Path) -> None:
    """No optimiser."""


def optimised(level: str) -> Callable[[Path, Path], None]:
    def optimise(source: Path, target: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return optimise


def stripped(source: Path, target: Path) -> None:
    """Remove the metadata and the names of all initializers and nodes."""
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


OPTIMISERS: dict[str, Callable[[Path, Path], None]] = {
    "": unchanged,
    "basic": optimised("BASIC"),
    "extended": optimised("EXTENDED"),
    "stripped": stripped,
    "onnxslim": slimmed,
    "onnxsim": simplified,
}


def save_tokenizer(folder: Path) -> None:
    words = models.WordLevel({f"w{number}": number for number in range(VOCABULARY_SIZE)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0", eos_token="w2")
    tokenizer.save_pretrained(folder)


def linear_weights(module: nn.Module) -> dict[str, NDArray[Any]]:
    """The weight of every linear layer as (out, in), by name."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            weight = layer.weight.detach().numpy()
            found[f"{name}.weight"] = weight.T if isinstance(layer, Conv1D) else weight
    return found


@functools.cache
def checkpoint_of(name: str) -> Path:
    """The folder in which the model of this name is saved."""
    import tempfile

    folder = Path(tempfile.mkdtemp()) / name
    model_of(name).save_pretrained(folder)
    return folder


def _random_adapter(sites: Sites, name: str) -> tuple[Any, nn.Module]:
    """Random pairs for every named linear layer, and the model with W + ΔW, summed in fp64 and rounded to fp32."""
    rng = np.random.default_rng(0)
    module = model_of(name)
    pairs, changes = {}, {}
    for weight, (out, inner) in {
        spec.name: spec.matrix for spec in sites.specs if spec.layout in (Layout.OUT_IN, Layout.IN_OUT)
    }.items():
        pair = LoraPair(a=rng.normal(size=(3, inner)) * 0.3, b=rng.normal(size=(out, 3)) * 0.3, scale=0.5)
        pairs[weight.removesuffix(".weight")] = pair
        change = 0.5 * pair.b.astype(np.float64) @ pair.a.astype(np.float64)
        is_in_out = isinstance(module.get_submodule(weight.removesuffix(".weight")), Conv1D)
        changes[weight] = change.T if is_in_out else change
    return an_adapter(pairs), with_changes(module, changes)


def run_file(path: Path, feeds: dict[str, Tensor]) -> Arrays:
    """The outputs of a graph by onnxruntime. Other inputs of the graph get positions, zeros or an empty cache."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays = {key: value.numpy() for key, value in feeds.items()}
    batch, length = feeds["input_ids"].shape
    for value in session.get_inputs():
        if value.name == "position_ids":
            arrays[value.name] = np.tile(np.arange(length), (batch, 1))
        elif value.name == "token_type_ids":
            arrays[value.name] = np.zeros((batch, length), np.int64)
        elif value.name not in arrays:  # an empty cache
            sizes = {"kv_cache_dim": HEAD_SIZE}
            shape = [size if isinstance(size, int) else sizes.get(size, 0) for size in value.shape]
            arrays[value.name] = np.zeros([batch, *shape[1:]], np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, arrays), strict=True))


def logits_of(arrays: Arrays) -> NDArray[Any]:
    """The output `logits`, or the first one."""
    return arrays.get("logits", next(iter(arrays.values())))


def assert_folds_like_pytorch(path: Path, name: str, folder: Path, *, tolerance: float = 2e-5) -> None:
    """An adapter that is folded into the graph gives the outputs of PyTorch with W + ΔW."""
    model = load_graph(path)
    sites = find_sites(model, open_checkpoint(checkpoint_of(name)))
    adapter, reference = _random_adapter(sites, name)
    assert adapter.pairs
    fold_graph(model, sites, plan.make([adapter], sites.specs))
    folder.mkdir()
    (*_, folded) = save_graph(model, folder, "folded.onnx")
    for batch, length in [(1, 5), (3, 11)]:
        feeds = token_inputs(batch, length)
        expected = eager(reference, feeds)["logits"]
        np.testing.assert_allclose(logits_of(run_file(folded, feeds)), expected, rtol=tolerance, atol=tolerance)
        without_adapter = logits_of(run_file(path, feeds))
        assert np.abs(expected - without_adapter).max() > 100 * tolerance


def save_adapter(name: str, folder: Path) -> Path:
    """Save a PEFT adapter with pairs for every linear layer of a model except the head."""
    rng = np.random.default_rng(0)
    shapes = {
        name_of_weight.removesuffix(".weight"): weight.shape
        for name_of_weight, weight in linear_weights(model_of(name)).items()
        if name_of_weight != "lm_head.weight"
    }
    return peft_adapter(
        folder,
        {
            module: (0.3 * rng.standard_normal((3, inner)), 0.3 * rng.standard_normal((out, 3)))
            for module, (out, inner) in shapes.items()
        },
    )


def assert_computes_merged_model(path: Path, name: str, adapter: Path, **more: Tensor) -> None:
    """The graph computes, also from these inputs of its own, what PyTorch computes with W + ΔW."""
    changes = {}
    for module, pair in formats.load(adapter).pairs.items():
        change = pair.scale * pair.b.astype(np.float64) @ pair.a
        linear = isinstance(model_of(name).get_submodule(module), torch.nn.Linear)
        changes[f"{module}.weight"] = change if linear else change.T
    expected = eager(with_changes(model_of(name), changes), token_inputs(3, 11))["logits"]
    actual = logits_of(run_file(path, {**token_inputs(3, 11), **more}))
    np.testing.assert_allclose(actual, expected, rtol=5e-5, atol=5e-5)
    assert np.abs(expected - eager(model_of(name), token_inputs(3, 11))["logits"]).max() > 1e-2
