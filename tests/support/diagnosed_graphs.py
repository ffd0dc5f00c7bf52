"""A BERT, its graph with an adapter in any mode, and a proof that ends in a diagnosis."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from lora_export import plan
from lora_export.formats import onnx_adapter
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_inputs import insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.models import export
from lora_export.models.model import Model, Sizes
from lora_export.models.traced_lengths import with_traced_lengths
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove
from support.exported_models import AXES, exported, inputs
from support.graphs import an_adapter

LAYER = "bert.encoder.layer.0"
QUERY, KEY, VALUE = (f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value"))
OUT, UP, DOWN = f"{LAYER}.attention.output.dense", f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"
WORDS = "bert.embeddings.word_embeddings"
SHAPES = {QUERY: (16, 16), KEY: (16, 16), VALUE: (16, 16), OUT: (16, 16), UP: (32, 16), DOWN: (16, 32)}
RANK, SCALE = 5, 3.0


@functools.cache
def bert() -> Model:
    def make(wanted: Sizes, generator: torch.Generator) -> dict[str, torch.Tensor]:
        made = inputs("bert", wanted["batch"], wanted["sequence"], seed=generator.initial_seed())
        if generator.initial_seed() % 2:  # an input that never varies would leave every verdict undecided
            made["attention_mask"][-1, -1] = 0
        return made

    module = exported("bert").module
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()))
    return with_traced_lengths(Model("bert", module, AXES["bert"], make, {"batch": 2, "sequence": 7}))


@functools.cache
def base_graph() -> ir.Model:
    return export.to_onnx(bert().module, bert().example_inputs(), axes=AXES["bert"])


@functools.cache
def the_adapter(name: str = "fr", seed: int = 0, *, dora: bool = False) -> Adapter:
    rng = np.random.default_rng(seed)

    def pair(out: int, into: int) -> LoraPair:
        magnitude = rng.uniform(0.5, 1.5, out) if dora else None
        a, b = 0.2 * rng.standard_normal((RANK, into)), 0.2 * rng.standard_normal((out, RANK))
        return LoraPair(a, b, SCALE, magnitude)

    return an_adapter({module: pair(*shape) for module, shape in SHAPES.items()}, name=name, sha256=f"{seed:02x}")


@dataclasses.dataclass
class Made:
    """A graph in one of the modes, to be damaged, and what runs it."""

    graph: ir.Model
    folder: Path
    runner: Callable[[OnnxRunner], OnnxRunner] = lambda runner: runner
    values: Any = None  # of an adapter file, in the mode `inputs`, and its contract
    contract: Any = None

    def weight(self, module: str) -> ir.Value:
        """The initializer of a base weight."""
        found = find_sites(self.graph)
        return found.by_name[f"{module}.weight"][0].value

    def put(self, value: ir.Value, array: NDArray[Any]) -> None:
        assert value.const_value is not None
        was = value.const_value.numpy()
        value.const_value = ir.Tensor(np.ascontiguousarray(array, was.dtype).reshape(was.shape), name=value.name)

    def change(self, module: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Change a module's weight, passed as (out, in)."""
        (site, *_) = find_sites(self.graph).by_name[f"{module}.weight"]
        matrix = change(site.matrix.astype(np.float64))
        self.put(site.value, matrix.T if site.layout is plan.Layout.IN_OUT else matrix)

    def factor(self, name: str) -> ir.Value:
        return self.graph.graph.initializers[name]

    def node(self, **wanted: str) -> ir.Node:
        (found,) = [
            node for node in self.graph.graph if all(getattr(node, key) == value for key, value in wanted.items())
        ]
        return found


def make(mode: str, folder: Path, *adapters: Adapter) -> Made:
    graph = base_graph().clone()
    found = find_sites(graph)
    steps = plan.make(adapters, found.specs)
    made = Made(graph, folder)
    if mode == "merged":
        fold_graph(graph, found, steps)
    elif mode == "nodes":
        insert_nodes(graph, found, steps)
    elif mode == "rows":
        insert_rows(graph, found, steps)
        made.runner = lambda runner: runner.with_rows([1])
    else:
        contract = insert_inputs(graph, found, [step.weight for step in steps.low_rank])
        values = onnx_adapter.input_values(contract, steps, adapters[0].name)
        made.values, made.contract = values, contract
    return made


def proven(made: Made, *adapters: Adapter, **options: Any) -> Proof:
    save_graph(made.graph, made.folder, "graph.onnx")
    if made.values is not None:
        path = made.folder / "a.onnx_adapter"
        onnx_adapter.write(path, made.values, made.contract, sha256="00")
        made.runner = lambda runner: runner.with_adapter(path)
    references = PyTorchReferences(bert(), adapters, cache=cache())
    return prove(made.runner(OnnxRunner(made.folder / "graph.onnx")), references, **options)


@functools.cache
def cache() -> Path:
    """A folder for the outputs of the references: faults of many graphs are judged by the same."""
    return Path(tempfile.mkdtemp(prefix="diagnosed-"))


def delta(module: str, adapter: Adapter | None = None) -> NDArray[np.float64]:
    pair = (adapter or the_adapter()).pairs[module]
    change: NDArray[np.float64] = pair.scale * (pair.b.astype(np.float64) @ pair.a)
    return change


def the_dora() -> Adapter:
    return the_adapter("dora", 3, dora=True)


def half_value(made: Made) -> Made:
    made.change(VALUE, lambda w: w - delta(VALUE) / 2)
    return made
