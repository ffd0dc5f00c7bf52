"""The first wrong module of a candidate is found and its fault explained: each defect is seeded into a graph."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from lora_export import layers, plan
from lora_export.errors import RuntimeRefused
from lora_export.formats import onnx_adapter
from lora_export.graph.exporter_metadata import FOLDED_FROM
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_inputs import insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file import writing
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.models import export, model
from lora_export.models.model import Model, Sizes
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.verification import against_pytorch
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.diagnose import localize, root_cause, traced_candidate
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import Proof, prove
from lora_export.verification.references.attached_module import attached_copy
from support.exported_models import AXES, exported, inputs
from support.graphs import an_adapter, stored

LAYER = "bert.encoder.layer.0"
QUERY, KEY, VALUE = (f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value"))
OUT, UP, DOWN = f"{LAYER}.attention.output.dense", f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"
WORDS = "bert.embeddings.word_embeddings"
SHAPES = {QUERY: (16, 16), KEY: (16, 16), VALUE: (16, 16), OUT: (16, 16), UP: (32, 16), DOWN: (16, 32)}
RANK, SCALE = 5, 3.0


@pytest.fixture(autouse=True)
def _one_case_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every case shows the fault, and the modules are tiny."""
    monkeypatch.setattr(model, "CHECKED_SIZES", model.CHECKED_SIZES[1:2])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        made.values, made.contract = values, contract  # type: ignore[attr-defined]
    return made


def proven(made: Made, *adapters: Adapter, **options: Any) -> Proof:
    save_graph(made.graph, made.folder, "graph.onnx")
    if hasattr(made, "values"):
        path = made.folder / "a.onnx_adapter"
        onnx_adapter.write(path, made.values, made.contract, sha256="00")
        made.runner = lambda runner: runner.with_adapter(path)
    return prove(made.runner(OnnxRunner(made.folder / "graph.onnx")), PyTorchReferences(bert(), adapters), **options)


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
    "half": (VALUE, lambda w: w - delta(VALUE) / 2, "has 0.5 times the correct strength (scale 3)"),
    "not divided": (KEY, lambda w: w + 4 * delta(KEY), "as if alpha were not divided by the rank, 5"),
    "left out": (DOWN, lambda w: w - delta(DOWN) * 2 / 3, "as if the scale, 3, were left out"),
    "upside down": (UP, lambda w: w - delta(UP) * 8 / 9, "as if the scale were inverted, 0.333333 for 3"),
    "twice": (OUT, lambda w: w + delta(OUT), "as if it were added twice"),
    "sign": (QUERY, lambda w: w - 2 * delta(QUERY), "has the wrong sign"),
    "neighbour's": (QUERY, lambda w: w - delta(QUERY) + delta(KEY), f"it has the adapter of {KEY}"),
    "transposed": (KEY, lambda w: w - delta(KEY) + delta(KEY).T, "its change, B A, is transposed"),
    "whole transposed": (VALUE, lambda w: w.T, "its weight is transposed"),
    "a head": (VALUE, lambda w: w - delta(VALUE) + in_head(delta(VALUE)), "missing in outputs 8 to 15 of 16"),
    "bf16": (UP, as_bf16, "its weights are rounded to bfloat16"),
    "no base": (OUT, lambda w: delta(OUT), "the base's weight is missing"),
    "other's base": (VALUE, lambda w: base_weight(KEY) + delta(VALUE), f"its weight is that of {KEY}"),
    "other base": (
        DOWN,
        lambda w: w + 0.01 * np.cos(np.arange(512)).reshape(16, 32),
        "off the sum of base and",
    ),
}


@pytest.mark.parametrize("defect", MERGED)
def test_wrongly_merged_weight_is_found_and_explained(defect: str, tmp_path: Path) -> None:
    module, damage, reason = MERGED[defect]
    made = make("merged", tmp_path, the_adapter())
    made.change(module, damage)
    result = proven(made, the_adapter())
    assert result.verdict.outcome is Outcome.DIFFERENT
    assert result.diagnosis is not None and result.diagnosis.first == module
    assert reason in result.diagnosis.why


def test_unexplained_fault_is_reported_as_such(tmp_path: Path) -> None:
    made = make("nodes", tmp_path, the_adapter())
    rng = np.random.default_rng(5)
    made.put(made.factor(f"{OUT}.lora_B.weight"), rng.standard_normal((RANK, 16)))
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == OUT
    assert root_cause.NOT_EXPLAINED in result.diagnosis.why


# --- inserted branches -------------------------------------------------------------------------


def b_transposed(made: Made) -> None:
    value = made.factor(f"{OUT}.lora_B.weight")
    made.put(value, stored(made.graph, value.name or "").reshape(16, RANK).T)


def b_times(factor: float, module: str) -> Callable[[Made], None]:
    def damage(made: Made) -> None:
        value = made.factor(f"{module}.lora_B.weight")
        made.put(value, stored(made.graph, value.name or "") * factor)

    return damage


def without_branch(made: Made) -> None:
    add = made.node(name=f"/{UP}/lora_B/Add")
    for node, index in add.outputs[0].uses():
        node.replace_input_with(index, add.inputs[0])


def reads_elsewhere(made: Made) -> None:
    """The insert_nodes of the attention's output reads the attention's input."""
    down = made.node(name=f"/{OUT}/lora_A/MatMul")
    (site,) = find_sites(made.graph).by_name[f"{QUERY}.weight"]
    down.replace_input_with(0, site.node.inputs[0])


def on_the_wrong_layer(made: Made) -> None:
    """The branches of query and key, swapped."""
    adds = [made.node(name=f"/{module}/lora_B/Add") for module in (QUERY, KEY)]
    products = [add.inputs[1] for add in adds]
    for add, product in zip(adds, reversed(products), strict=True):
        add.replace_input_with(1, product)
    made.graph.graph.sort()


def other_base(made: Made) -> None:
    made.change(VALUE, lambda w: w + 0.02 * np.sin(np.arange(256)).reshape(16, 16))


def without_bias(made: Made) -> None:
    made.put(made.factor(f"{UP}.bias"), np.zeros(32))


NODES: Mapping[str, tuple[str, Callable[[Made], None], str]] = {
    "B transposed": (OUT, b_transposed, "its B is transposed"),
    "rsLoRA": (KEY, b_times(5**0.5, KEY), "as if alpha were divided by the root of the rank"),
    "no branch": (UP, without_branch, "its adapter is missing"),
    "elsewhere": (OUT, reads_elsewhere, f"its adapter reads the input of {QUERY}"),
    "wrong layer": (QUERY, on_the_wrong_layer, f"it has the adapter of {KEY}"),
    "other base": (VALUE, other_base, "its stored weight is not the base's: they are"),
    "no bias": (UP, without_bias, "its bias is missing"),
}


@pytest.mark.parametrize("defect", NODES)
def test_wrongly_inserted_branch_is_found_and_explained(defect: str, tmp_path: Path) -> None:
    module, damage, reason = NODES[defect]
    made = make("nodes", tmp_path, the_adapter())
    damage(made)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == module
    assert reason in result.diagnosis.why


def test_one_missing_adapter_of_two_is_named(tmp_path: Path) -> None:
    both = the_adapter(), the_adapter("de", 1)
    made = make("nodes", tmp_path, *both)
    made.put(made.factor(f"{VALUE}.lora_B.de.weight"), np.zeros((RANK, 16)))
    result = proven(made, *both)
    assert result.diagnosis is not None and result.diagnosis.first == VALUE
    assert "its adapter de is missing" in result.diagnosis.why and "fr" not in result.diagnosis.why


def the_dora() -> Adapter:
    return the_adapter("dora", 3, dora=True)


def no_magnitude(made: Made) -> None:
    mul = made.node(name=f"/{KEY}/lora_magnitude_vector/Mul")
    for node, index in mul.outputs[0].uses():
        node.replace_input_with(index, mul.inputs[0])


def norm_of_the_base(made: Made) -> None:
    magnitude = the_dora().pairs[KEY].magnitude
    assert magnitude is not None
    length = magnitude / np.linalg.norm(base_weight(KEY), axis=1)
    made.put(made.factor(f"{KEY}.lora_magnitude_vector.weight"), length)


DORA: Mapping[str, tuple[Callable[[Made], None], str]] = {
    "no magnitude": (no_magnitude, "DoRA's magnitude is missing"),
    "norm of W": (norm_of_the_base, "divided by the norm of W, and not of W + BA"),
}


@pytest.mark.parametrize("defect", DORA)
def test_wrong_dora_is_explained(defect: str, tmp_path: Path) -> None:
    damage, reason = DORA[defect]
    made = make("nodes", tmp_path, the_dora())
    damage(made)
    result = proven(made, the_dora())
    assert result.diagnosis is not None and result.diagnosis.first == KEY
    assert reason in result.diagnosis.why


# --- adapter files and ids ------------------------------------------------------------------------------------


def test_wrongly_scaled_adapter_file_is_wrong_in_every_module(tmp_path: Path) -> None:
    made = make("inputs", tmp_path, the_adapter())
    made.values = {name: 1.1 * array if "lora_B" in name else array for name, array in made.values.items()}
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == QUERY
    assert "as if it were a tenth too strong" in result.diagnosis.why
    assert "5 are wrong, 5 in the same way" in result.diagnosis.why


def test_adapter_file_with_another_modules_factors_is_explained(tmp_path: Path) -> None:
    made = make("inputs", tmp_path, the_adapter())
    other = the_adapter().pairs[VALUE]
    made.values[f"{KEY}.lora_A.weight"] = other.a.T.copy()
    made.values[f"{KEY}.lora_B.weight"] = other.b.T * np.float32(SCALE)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == KEY
    assert f"it has the adapter of {VALUE}" in result.diagnosis.why


def test_graph_without_its_adapter_file_is_explained(tmp_path: Path) -> None:
    made = make("inputs", tmp_path, the_adapter())
    save_graph(made.graph, tmp_path, "graph.onnx")
    result = prove(OnnxRunner(tmp_path / "graph.onnx"), PyTorchReferences(bert(), [the_adapter()]))
    assert result.diagnosis is not None and result.diagnosis.first == QUERY
    assert "its adapter is missing" in result.diagnosis.why and "--onnx-adapter" in result.diagnosis.why


def test_wrong_adapter_id_names_the_correct_one(tmp_path: Path) -> None:
    made = make("rows", tmp_path, the_adapter(), the_adapter("de", 1))
    result = proven(made, the_adapter("de", 1))
    assert result.diagnosis is not None and result.diagnosis.first == QUERY
    assert "with adapter id 2 (de) its output would be correct" in result.diagnosis.why


def test_wrong_scale_in_one_module_of_rows_is_explained(tmp_path: Path) -> None:
    made = make("rows", tmp_path, the_adapter())
    b_times(3, DOWN)(made)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == DOWN
    assert "as if the scale, 3, were applied twice" in result.diagnosis.why
    assert "with adapter id" not in result.diagnosis.why


# --- between modules ----------------------------------------------------------------------------


def without_mask(made: Made) -> None:
    """The attention's mask, replaced by ones."""
    shape = ir.node("Shape", [made.graph.graph.inputs[1]])
    one = ir.Value(name="one", const_value=ir.Tensor(np.array([1], np.int64), name="one"))
    made.graph.graph.register_initializer(one)
    ones = ir.node("Expand", [one, shape.outputs[0]])
    uses = made.graph.graph.inputs[1].uses()
    made.graph.graph.insert_before(made.graph.graph[0], [shape, ones])
    for node, index in uses:
        if node.op_type != "Shape":
            node.replace_input_with(index, ones.outputs[0])


def another_norm(made: Made) -> None:
    value = made.factor(f"{LAYER}.attention.output.LayerNorm.weight")
    made.put(value, 1.001 * stored(made.graph, value.name or ""))


def another_activation(made: Made) -> None:
    gelu = made.node(op_type="Gelu")
    relu = ir.node("Relu", [gelu.inputs[0]])
    made.graph.graph.insert_after(gelu, [relu])
    for node, index in gelu.outputs[0].uses():
        node.replace_input_with(index, relu.outputs[0])


BETWEEN = {
    "mask": (without_mask, VALUE, OUT, "it is as if the input attention_mask were all ones"),
    "norm": (another_norm, OUT, UP, "between the two, in no such layer"),
    "activation": (another_activation, UP, DOWN, "between the two, in no such layer"),
}


@pytest.mark.parametrize("mode", ["merged", "rows"])
@pytest.mark.parametrize("defect", BETWEEN)
def test_fault_between_modules_is_located(defect: str, mode: str, tmp_path: Path) -> None:
    damage, before, after, reason = BETWEEN[defect]
    made = make(mode, tmp_path, the_adapter())
    damage(made)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == after
    assert f"; {before}, which runs before it, agrees" in result.diagnosis.why
    assert reason in result.diagnosis.why


def test_fault_after_the_last_module_is_located(tmp_path: Path) -> None:
    made = make("merged", tmp_path, the_adapter())
    (output,) = made.graph.graph.outputs
    scaled = ir.node("Add", [output, output])
    scaled.outputs[0].type, scaled.outputs[0].shape = output.type, output.shape
    made.graph.graph.append(scaled)
    scaled.outputs[0].name, output.name = output.name, "inner"
    made.graph.graph.outputs[0] = scaled.outputs[0]
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first is None
    assert "the fault is after classifier, or outside these modules" in result.diagnosis.why


# --- correct candidates ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["merged", "nodes", "inputs", "rows", "dora"])
def test_correct_graph_agrees_in_every_module(mode: str, tmp_path: Path) -> None:
    adapter = the_dora() if mode == "dora" else the_adapter()
    made = make("nodes" if mode == "dora" else mode, tmp_path, adapter)
    result = proven(made, adapter, trace=True)
    assert result.verdict.same and result.diagnosis is not None
    assert result.diagnosis.first is None and "11 of 11 modules were compared" in result.diagnosis.why
    assert [layer.name for layer in result.diagnosis.layers[:4]] == [
        WORDS, "bert.embeddings.token_type_embeddings", "bert.embeddings.position_embeddings", QUERY,
    ]  # fmt: skip
    for layer in result.diagnosis.layers:
        assert layer.error <= 8 * layer.deployed_error or layer.error < 1e-8  # PyTorch looks embeddings up exactly
        assert layer.effect is not None and (layer.effect > 1e-5) == ("embeddings" not in layer.name)


def test_same_candidate_is_not_diagnosed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(against_pytorch, "diagnose", unexpected)
    assert proven(make("merged", tmp_path, the_adapter()), the_adapter()).diagnosis is None


def test_small_difference_is_blamed_on_no_module(tmp_path: Path) -> None:
    made = make("merged", tmp_path, the_adapter())
    made.put(made.factor("classifier.weight"), stored(made.graph, "classifier.weight") * (1 + 2.0**-16))
    result = proven(made, the_adapter())
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is not None
    assert result.diagnosis.first is None and "the difference is small and no module stands out" in result.diagnosis.why


def test_difference_that_vanishes_when_traced_is_the_optimisers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fusing(OnnxRunner):
        def run(self, inputs: Any, names: Any = None) -> Any:
            answer = super().run(inputs, names)
            return answer if len(self.session.get_outputs()) > 1 else {key: 1.1 * v for key, v in answer.items()}

    save_graph(make("merged", tmp_path, the_adapter()).graph, tmp_path, "graph.onnx")
    result = prove(Fusing(tmp_path / "graph.onnx"), PyTorchReferences(bert(), [the_adapter()]))
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is not None
    assert result.diagnosis.first is None and "the difference comes from its optimisations" in result.diagnosis.why


# --- how a candidate is traced -----------------------------------------------------------------------------


def half_value(made: Made) -> Made:
    made.change(VALUE, lambda w: w - delta(VALUE) / 2)
    return made


def test_failed_diagnosis_leaves_the_verdict_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeRefused("onnxruntime: no\nmore")

    monkeypatch.setattr(traced_candidate, "expose", failing)
    result = proven(half_value(make("merged", tmp_path, the_adapter())), the_adapter())
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is None
    assert "modules could not be compared: onnxruntime: no" in result.verdict.notes


def test_large_models_are_compared_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localize, "MAX_HELD_NUMBERS", 3000)  # numbers: two or three modules
    made = half_value(make("merged", tmp_path, the_adapter()))
    groups: list[int] = []
    run = traced_candidate.TracedGraph.run

    def recording(self: Any, inputs: Any, calls: Any) -> Any:
        groups.append(len(calls))
        return run(self, inputs, calls)

    monkeypatch.setattr(traced_candidate.TracedGraph, "run", recording)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == VALUE
    assert "has 0.5 times the correct strength" in result.diagnosis.why
    assert len(groups) > 1 and sum(groups) < 11 and max(groups) <= 3  # it stops at the first difference
    groups.clear()
    result = proven(made, the_adapter(), trace=True)
    assert result.diagnosis is not None and result.diagnosis.first == VALUE
    assert sum(groups) == len(result.diagnosis.layers) == 11


def test_external_weights_remain_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 0)
    made = half_value(make("merged", tmp_path, the_adapter()))
    result = proven(made, the_adapter())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".data", ".onnx"]  # and nothing else
    assert max(path.stat().st_size for path in tmp_path.iterdir() if path.suffix == ".onnx") < 60_000
    assert result.diagnosis is not None and result.diagnosis.first == VALUE
    assert "has 0.5 times the correct strength" in result.diagnosis.why


@pytest.mark.parametrize("defect", [True, False])
def test_graph_fused_by_onnxruntime_is_compared_where_possible(defect: bool, tmp_path: Path) -> None:
    made = make("nodes" if not defect else "merged", tmp_path, the_adapter())
    if defect:
        half_value(made)
    save_graph(made.graph, tmp_path, "graph.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in load_graph(tmp_path / "fused.onnx").graph}
    assert {"BiasGelu", "FusedGemm", "SkipLayerNormalization"} <= operators
    result = prove(OnnxRunner(tmp_path / "fused.onnx"), PyTorchReferences(bert(), [the_adapter()]), trace=True)
    assert result.diagnosis is not None and result.diagnosis.first == (VALUE if defect else None)
    assert "10 of 11 modules were compared" in result.diagnosis.why  # the pooler's is fused with its tanh
    assert not defect or "none is wrong" in result.diagnosis.why


def test_graph_whose_names_lost_their_prefix_is_diagnosed(tmp_path: Path) -> None:
    made = half_value(make("merged", tmp_path, the_adapter()))
    for value in list(made.graph.graph.initializers.values()):
        origin = value.metadata_props.pop(FOLDED_FROM, None)
        name = origin[2:-2] if origin else value.name
        if name and name.startswith("bert."):
            value.name = name.removeprefix("bert.")
    for node in made.graph.graph:
        node.metadata_props.clear()
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == VALUE


def test_merged_module_is_diagnosed_by_hooks() -> None:
    steps = plan.make([the_adapter()], layers.specs(bert().module))
    module = copy.deepcopy(bert().module)
    layers.fold(module, steps)
    with torch.no_grad():
        module.get_submodule(DOWN).weight.sub_(torch.from_numpy(delta(DOWN) / 2))  # type: ignore[union-attr, operator]
    result = prove(ModuleRunner(module), PyTorchReferences(bert(), [the_adapter()]))
    assert result.diagnosis is not None and result.diagnosis.first == DOWN
    assert "has 0.5 times the correct strength" in result.diagnosis.why


def test_bf16_merge_is_compared_with_bf16_weights() -> None:
    module = copy.deepcopy(bert().module)
    layers.fold(module, plan.make([the_adapter()], layers.specs(module)))
    with torch.no_grad():
        module.get_submodule(DOWN).weight.sub_(torch.from_numpy(delta(DOWN) / 2))  # type: ignore[union-attr, operator]
        for name in SHAPES:
            weight = module.get_submodule(name).weight
            weight.copy_(weight.bfloat16())  # type: ignore[union-attr, operator]
    stored = {f"{name}.weight": "bfloat16" for name in SHAPES}
    result = prove(ModuleRunner(module, stored_dtypes=stored), PyTorchReferences(bert(), [the_adapter()]))
    assert result.diagnosis is not None and result.diagnosis.first == DOWN
    assert "has 0.5 times the correct strength" in result.diagnosis.why and "none is wrong" in result.diagnosis.why


def scripted(module: torch.nn.Module, folder: Path) -> ScriptRunner:
    export.save_torchscript(export.to_torchscript(module, bert().example_inputs()), folder / "script.pt", extra={})
    return ScriptRunner(folder / "script.pt", bert().input_names)


def test_torchscript_is_diagnosed_by_its_weights(tmp_path: Path) -> None:
    module = copy.deepcopy(bert().module)
    layers.fold(module, plan.make([the_adapter()], layers.specs(module)))
    with torch.no_grad():
        module.get_submodule(DOWN).weight.sub_(torch.from_numpy(delta(DOWN) / 2))  # type: ignore[union-attr, operator]
    result = prove(scripted(module, tmp_path), PyTorchReferences(bert(), [the_adapter()]))
    assert result.diagnosis is not None and result.diagnosis.first == DOWN
    assert "has 0.5 times the correct strength" in result.diagnosis.why


def test_torchscript_with_branches_is_diagnosed_by_a_and_b(tmp_path: Path) -> None:
    wrong = the_adapter()
    pair = wrong.pairs[DOWN.removesuffix(".weight")]
    halved = dataclasses.replace(
        wrong, pairs={**wrong.pairs, DOWN.removesuffix(".weight"): dataclasses.replace(pair, b=pair.b / 2)}
    )
    result = prove(scripted(attached_copy(bert(), [halved]), tmp_path), PyTorchReferences(bert(), [wrong]))
    assert result.diagnosis is not None and result.diagnosis.first == DOWN
    assert "has 0.5 times the correct strength" in result.diagnosis.why


def test_torchscript_with_other_tensors_is_not_diagnosed(tmp_path: Path) -> None:
    candidate = scripted(attached_copy(bert(), [the_adapter("de", 1)]), tmp_path)
    result = prove(candidate, PyTorchReferences(bert(), [the_adapter()]))
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is None
    assert any("its modules cannot be traced" in note for note in result.verdict.notes)


# --- other kinds of layers ----------------------------------------------------------------------


def test_missing_adapter_of_an_embedding_is_explained(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pair = LoraPair(0.3 * rng.standard_normal((2, 50)), 0.3 * rng.standard_normal((16, 2)), 1.0, embedding=True)
    adapter = an_adapter({WORDS: pair, **the_adapter().pairs}, sha256="ee")
    result = proven(make("nodes", tmp_path, the_adapter()), adapter)
    assert result.diagnosis is not None and result.diagnosis.first == WORDS
    assert "its adapter is missing" in result.diagnosis.why and "none is wrong" in result.diagnosis.why
