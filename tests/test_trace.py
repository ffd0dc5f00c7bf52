"""A wrong candidate is followed to the module where it goes wrong, and told why: each defect, seeded into a graph."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import AXES, an_adapter, exported, inputs, stored
from numpy.typing import NDArray
from torch import nn

from lora_export import layers, plan, proof, trace
from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter
from lora_export.graph import files as graph_files
from lora_export.graph import sites
from lora_export.graph.branches import branch
from lora_export.graph.fold import fold
from lora_export.graph.inputs import open_inputs
from lora_export.graph.rows import choose_by_row
from lora_export.lora import Adapter, LoraPair
from lora_export.model import Model, Sizes
from lora_export.parity import Outcome
from lora_export.runtime import ModuleRunner, OnnxRunner, ScriptRunner

LAYER = "bert.encoder.layer.0"
QUERY, KEY, VALUE = (f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value"))
OUT, UP, DOWN = f"{LAYER}.attention.output.dense", f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"
WORDS = "bert.embeddings.word_embeddings"
SHAPES = {QUERY: (16, 16), KEY: (16, 16), VALUE: (16, 16), OUT: (16, 16), UP: (32, 16), DOWN: (16, 32)}
RANK, SCALE = 5, 3.0


@functools.cache
def bert() -> Model:
    def make(wanted: Sizes, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return inputs("bert", wanted["batch"], wanted["sequence"], seed=generator.initial_seed())

    module = exported("bert").module
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()))
    return Model("bert", module, AXES["bert"], make, {"batch": 2, "sequence": 7})


@functools.cache
def base_graph() -> ir.Model:
    from lora_export import export

    return export.to_onnx(bert().module, bert().examples(), axes=AXES["bert"])


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
    """A graph in one of the modes, to be harmed, and what runs it."""

    graph: ir.Model
    folder: Path
    runner: Callable[[OnnxRunner], OnnxRunner] = lambda runner: runner

    def weight(self, module: str) -> ir.Value:
        """The initializer of a base weight."""
        found = sites.find(self.graph)
        return found.by_name[f"{module}.weight"][0].value

    def put(self, value: ir.Value, array: NDArray[Any]) -> None:
        assert value.const_value is not None
        was = value.const_value.numpy()
        value.const_value = ir.Tensor(np.ascontiguousarray(array, was.dtype).reshape(was.shape), name=value.name)

    def change(self, module: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Change a weight as the module has it, (out, in)."""
        (site, *_) = sites.find(self.graph).by_name[f"{module}.weight"]
        matrix = change(site.matrix.astype(np.float64))
        self.put(site.value, matrix.T if site.layout is plan.Layout.IN_OUT else matrix)

    def factor(self, name: str) -> ir.Value:
        return self.graph.graph.initializers[name]

    def node(self, **wanted: str) -> ir.Node:
        (found,) = [
            node
            for node in self.graph.graph
            if all(getattr(node, key) == value for key, value in wanted.items())
        ]
        return found


def make(mode: str, folder: Path, *adapters: Adapter) -> Made:
    graph = base_graph().clone()
    found = sites.find(graph)
    steps = plan.make(adapters, found.specs)
    made = Made(graph, folder)
    if mode == "merged":
        fold(graph, found, steps)
    elif mode == "nodes":
        branch(graph, found, steps)
    elif mode == "rows":
        choose_by_row(graph, found, steps)
        made.runner = lambda runner: runner.with_rows([1])
    else:
        contract = open_inputs(graph, found, [step.weight for step in steps.low_rank])
        given = onnx_adapter.parameters(contract, steps, adapters[0].name)
        made.given, made.contract = given, contract  # type: ignore[attr-defined]
    return made


def proven(made: Made, *adapters: Adapter, **options: Any) -> proof.Proof:
    graph_files.save(made.graph, made.folder, "graph.onnx")
    if hasattr(made, "given"):
        path = made.folder / "a.onnx_adapter"
        onnx_adapter.write(path, made.given, made.contract, sha256="00")
        made.runner = lambda runner: runner.with_adapter(path)
    return proof.prove(made.runner(OnnxRunner(made.folder / "graph.onnx")), bert(), adapters, **options)


def delta(module: str, adapter: Adapter | None = None) -> NDArray[np.float64]:
    pair = (adapter or the_adapter()).pairs[module]
    change: NDArray[np.float64] = pair.scale * (pair.b.astype(np.float64) @ pair.a)
    return change


def base_weight(module: str) -> NDArray[np.float64]:
    return bert().module.get_submodule(module).weight.detach().double().numpy()  # type: ignore[union-attr, operator]


# --- merged -------------------------------------------------------------------------------------


def in_head(change: NDArray[Any]) -> NDArray[Any]:
    change = change.copy()
    change[8:] = 0
    return change


def as_bf16(weight: NDArray[Any]) -> NDArray[Any]:
    return weight.astype(ml_dtypes.bfloat16).astype(np.float64)


MERGED: Mapping[str, tuple[str, Callable[[NDArray[Any]], NDArray[Any]], str]] = {
    "missing": (QUERY, lambda w: w - delta(QUERY), "its adapter is missing"),
    "half": (VALUE, lambda w: w - delta(VALUE) / 2, "arrives 0.5 times as strong as it should (scale 3)"),
    "not divided": (KEY, lambda w: w + 4 * delta(KEY), "as if alpha were not divided by the rank, 5"),
    "left out": (DOWN, lambda w: w - delta(DOWN) * 2 / 3, "as if the scale, 3, were left out"),
    "upside down": (UP, lambda w: w - delta(UP) * 8 / 9, "as if the scale were upside down, 0.333333 for 3"),
    "twice": (OUT, lambda w: w + delta(OUT), "as if it were added twice"),
    "sign": (QUERY, lambda w: w - 2 * delta(QUERY), "has the wrong sign"),
    "neighbour's": (QUERY, lambda w: w - delta(QUERY) + delta(KEY), f"it has the adapter of {KEY}"),
    "transposed": (KEY, lambda w: w - delta(KEY) + delta(KEY).T, "its change, B A, is transposed"),
    "whole transposed": (VALUE, lambda w: w.T, "its weight is transposed"),
    "a head": (VALUE, lambda w: w - delta(VALUE) + in_head(delta(VALUE)), "missing in outputs 8 to 15 of 16"),
    "bf16": (UP, as_bf16, "its weights are rounded to bfloat16"),
    "no base": (OUT, lambda w: delta(OUT), "the base's own weight is missing"),
    "other's base": (VALUE, lambda w: base_weight(KEY) + delta(VALUE), f"its weight is that of {KEY}"),
    "other base": (DOWN, lambda w: w + 0.01 * np.cos(np.arange(512)).reshape(16, 32), "off what base and adapter make"),
}


@pytest.mark.parametrize("defect", MERGED)
def test_a_weight_that_was_merged_wrongly_is_found_and_explained(defect: str, tmp_path: Path) -> None:
    module, harm, told = MERGED[defect]
    made = make("merged", tmp_path, the_adapter())
    made.change(module, harm)
    result = proven(made, the_adapter())
    assert result.verdict.outcome is Outcome.DIFFERENT
    assert result.diagnosis is not None and result.diagnosis.first == module
    assert told in result.diagnosis.why


def test_what_nothing_explains_is_said_not_to_be_explained(tmp_path: Path) -> None:
    made = make("nodes", tmp_path, the_adapter())
    rng = np.random.default_rng(5)
    made.put(made.factor(f"{OUT}.lora_B.weight"), rng.standard_normal((RANK, 16)))
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == OUT
    assert trace.NOT_EXPLAINED in result.diagnosis.why
