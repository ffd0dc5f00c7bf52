"""A and B of a candidate, compared with the adapter's in every form in which they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export import layers, plan
from lora_export.formats import onnx_adapter
from lora_export.formats.onnx_adapter import input_values
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_inputs import insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.site import NameSource
from lora_export.lora import Adapter, LoraPair
from lora_export.models.export import to_onnx
from lora_export.models.load import from_module
from lora_export.models.model import Model
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Runner
from lora_export.verification.against_graph import GraphReferences
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import prove
from lora_export.verification.references.candidate_tensors import candidate_tensors
from lora_export.verification.references.compare_pairs import compare_pairs
from lora_export.verification.references.compare_tensors import CandidateTensor

Arrays = dict[str, NDArray[Any]]
Defect = Callable[[Arrays, str, str], None]  # changes A and B of these names


class Routed(nn.Module):
    """Two layers of each kind, of which inputs hardly ever reach the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.often, self.rare = nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.mean(-1, keepdim=True) > 5, self.rare(x), self.often(x))


@pytest.fixture(scope="module")
def routed() -> Model:
    return from_module(Routed(), {"x": torch.randn(2, 5, 16)})


def an_adapter(name: str, rank: int) -> Adapter:
    rng = np.random.default_rng(rank)
    pairs = {
        layer: LoraPair(a=rng.normal(size=(rank, 16)), b=rng.normal(size=(24, rank)), scale=0.5)
        for layer in ("often", "rare")
    }
    return Adapter(name=name, format="test", sha256=name, pairs=pairs)


ONE, TWO = an_adapter("one", 3), an_adapter("two", 2)


@pytest.fixture(scope="module")
def base(routed: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_graph(to_onnx(routed.module, routed.example_inputs(), axes=routed.axes), folder, "base.onnx")
    return folder / "base.onnx"


def write(base: Path, folder: Path, mode: str, defect: Defect | None = None) -> OnnxRunner:
    """The graph with adapter `one` in a mode, and the defect in its A and B at the rare layer."""
    graph = load_graph(base)
    sites = find_sites(graph)
    adapters = [ONE] if mode in ("nodes", "inputs") else [TWO, ONE]
    steps = plan.make(adapters, sites.specs, one_at_a_time=mode == "rows")
    names = ("rare.lora_A.weight", "rare.lora_B.weight")
    if mode == "inputs":
        contract = insert_inputs(graph, sites, [step.weight for step in steps.steps])
        values = {name: array.copy() for name, array in input_values(contract, steps, "one").items()}
        if defect:
            defect(values, *names)
        save_graph(graph, folder, "m.onnx")
        onnx_adapter.write(folder / "one.onnx_adapter", values, contract, sha256="01")
        return OnnxRunner(folder / "m.onnx").with_adapter(folder / "one.onnx_adapter")
    if mode == "rows":
        insert_rows(graph, sites, steps)
    else:
        insert_nodes(graph, sites, steps)
        names = tuple(f"rare.{part}.one.weight" for part in ("lora_A", "lora_B")) if mode == "several" else names
    if defect:
        values = {name: graph.graph.initializers[name].const_value.numpy().copy() for name in names}
        own = {name: array[2] if mode == "rows" else array for name, array in values.items()}
        defect(own, *names)
        for name, array in values.items():
            array[2 if mode == "rows" else ...] = own[name]
            graph.graph.initializers[name].const_value = ir.Tensor(array)
    save_graph(graph, folder, "m.onnx")
    runner = OnnxRunner(folder / "m.onnx")
    return runner.with_rows([2]) if mode == "rows" else runner


def adapters_of(mode: str) -> list[Adapter]:
    return [TWO, ONE] if mode == "several" else [ONE]


def found_in(runner: Runner, model: Model, mode: str) -> tuple[list[str], list[str]]:
    specs = layers.specs(model.module)
    found = compare_pairs(runner, candidate_tensors, specs, plan.make(adapters_of(mode), specs), "float32")
    return list(found.faults), list(found.notes)


MODES = pytest.mark.parametrize("mode", ["nodes", "several", "inputs", "rows"])


@MODES
def test_right_pairs_are_compared(mode: str, routed: Model, base: Path, tmp_path: Path) -> None:
    faults, notes = found_in(write(base, tmp_path, mode), routed, mode)
    assert (faults, notes) == ([], ["A and B beside 2 weights were compared with the adapter's"])


def one_number(arrays: Arrays, a: str, b: str) -> None:
    arrays[a][5, 1] *= 1.001


def one_output(arrays: Arrays, a: str, b: str) -> None:
    arrays[b][:, 7] *= -1


def a_scale(arrays: Arrays, a: str, b: str) -> None:
    arrays[b] *= 2


def another_a(arrays: Arrays, a: str, b: str) -> None:
    arrays[a][:] = arrays[a][::-1].copy()


DEFECTS = {
    one_number: "1 of 16 inputs (A) have another s·BA, the first of them 5",
    one_output: "1 of 24 outputs (B) have another s·BA, the first of them 7",
    a_scale: "16 of 16 inputs (A)",
    another_a: "of 16 inputs (A)",
}


@MODES
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda each: each.__name__)
def test_wrong_pairs_are_found(defect: Defect, mode: str, routed: Model, base: Path, tmp_path: Path) -> None:
    faults, _ = found_in(write(base, tmp_path, mode, defect), routed, mode)
    assert len(faults) == 1 and faults[0].startswith("rare.weight: A and B beside it are not the adapter's: ")
    assert DEFECTS[defect] in faults[0]


def test_pairs_rounded_to_bf16_are_found_in_a_candidate_in_fp16(routed: Model, base: Path, tmp_path: Path) -> None:
    def rounded(arrays: Arrays, a: str, b: str) -> None:
        for name in (a, b):
            arrays[name][:] = arrays[name].astype(ml_dtypes.bfloat16).astype(np.float32)

    specs, runner = layers.specs(routed.module), write(base, tmp_path, "nodes", rounded)
    faults = {}
    for dtype in ("float32", "float16"):
        for adapter in (ONE, dataclasses.replace(ONE, pairs={**ONE.pairs, "rare": of_bf16(ONE.pairs["rare"])})):
            found = compare_pairs(runner, candidate_tensors, specs, plan.make([adapter], specs), dtype)
            faults[dtype, adapter is ONE] = found.faults
    ((fault,), *others) = (faults.pop(("float16", True)), *faults.values())
    assert fault.startswith("rare.weight: A beside it was rounded to bf16: ") and "of 48 numbers" in fault
    assert others == [(), (), ()]


def of_bf16(pair: LoraPair) -> LoraPair:
    """A pair as an adapter in bf16 has it."""
    a, b = (each.astype(ml_dtypes.bfloat16).astype(np.float32) for each in (pair.a, pair.b))
    return dataclasses.replace(pair, a=a, b=b)


@pytest.mark.parametrize("against", ["pytorch", "graph"])
def test_a_wrong_pair_that_no_input_reaches_is_different(
    against: str, routed: Model, base: Path, tmp_path: Path
) -> None:
    references = {
        "pytorch": lambda: PyTorchReferences(routed, [ONE]),
        "graph": lambda: GraphReferences.open(base, "nodes", [ONE]),
    }[against]
    right = prove(write(base, tmp_path, "nodes"), references()).verdict
    assert any(note.startswith("A and B beside 2 weights") for note in right.notes)
    wrong = prove(write(base, tmp_path, "nodes", one_number), references()).verdict
    assert wrong.outcome is Outcome.DIFFERENT
    assert any(reason.gate == "weights" and "rare.weight" in str(reason) for reason in wrong.reasons)
    assert not any(reason.outcome is Outcome.DIFFERENT for reason in right.reasons)


def test_a_scale_may_be_beside_b_in_a_graph(routed: Model, base: Path, tmp_path: Path) -> None:
    graph = load_graph(write(base, tmp_path, "nodes", lambda arrays, _, b: arrays[b].__imul__(2)).path)
    value = graph.graph.initializers["rare.lora_B.weight"]
    ((node, _),) = value.uses()
    (product,) = node.outputs
    half = ir.Value(name="half", const_value=ir.tensor(np.float32(0.5)), type=ir.TensorType(ir.DataType.FLOAT))
    graph.graph.register_initializer(half)
    scaled = ir.node("Mul", [product, half], name="scaled")
    ir.convenience.replace_all_uses_with(product, scaled.outputs[0])
    scaled.replace_input_with(0, product)
    graph.graph.insert_after(node, scaled)
    save_graph(graph, tmp_path, "scaled.onnx")
    faults, notes = found_in(OnnxRunner(tmp_path / "scaled.onnx"), routed, "nodes")
    assert (faults, notes) == ([], ["A and B beside 2 weights were compared with the adapter's"])


# --- other tools' forms --------------------------------------------------------------------------


class Tensors:
    """A candidate that has these tensors, and is no graph."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]):
        self.arrays = arrays

    def __iter__(self) -> Any:
        for name, array in self.arrays.items():
            yield CandidateTensor(name, NameSource.INITIALIZER, array.shape, lambda array=array: array)


def compared(arrays: Mapping[str, NDArray[Any]], model: Model, dtype: str = "float32") -> tuple[list[str], list[str]]:
    candidate: Any = Tensors(arrays)
    specs = layers.specs(model.module)
    found = compare_pairs(candidate, iter, specs, plan.make([ONE], specs), dtype)
    return list(found.faults), list(found.notes)


PAIR = ONE.pairs["rare"]
A, B = PAIR.a, PAIR.b  # (3, 16) and (24, 3)
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
FORMS = {
    "as PEFT stores them": (A, B),
    "turned": (A.T, B.T),
    "with the scale in A": (A * 0.5, B),
    "in half precision": (A.astype(np.float16), (0.5 * B).astype(np.float16)),
    "another A and B of the same product": (ROTATION @ A, 0.5 * B @ ROTATION.T),
    "padded": (np.pad(A, ((0, 2), (0, 0))), np.pad(B, ((0, 0), (0, 2)))),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["base_model.model.rare.lora_{}.default.weight", "rare.lora_{}.MatMul.weight"])
def test_forms_of_other_tools_are_known(form: str, name: str, routed: Model) -> None:
    a, b = FORMS[form]
    faults, notes = compared({name.format("A"): a, name.format("B"): b}, routed)
    assert (faults, notes) == ([], ["A and B beside 1 weight were compared with the adapter's"])
    wrong = b.copy()
    (wrong if len(wrong) == 24 else wrong.T)[5] = 0
    (fault,), _ = compared({name.format("A"): a, name.format("B"): wrong}, routed)
    assert "1 of 24 outputs (B) have another s·BA, the first of them 5" in fault


@pytest.mark.parametrize(
    ("a", "b"),
    [(A * np.arange(1, 17), B), (A[:, ::-1], B), (A, B * 3), (A[:, :8], B)],
    ids=["norm", "turn", "c", "size"],
)
def test_what_is_not_known_is_left_to_the_outputs(a: Any, b: Any, routed: Model) -> None:
    assert compared({"rare.lora_A.default": a, "rare.lora_B.default": b}, routed) == ([], [])


def test_an_adapter_beside_the_used_one_is_no_fault(routed: Model) -> None:
    tensors = {f"rare.lora_{part}.{name}": array * factor for name, factor in (("used", 1), ("other", 2))
               for part, array in (("A", A), ("B", B))}  # fmt: skip
    faults, _ = compared(tensors, routed)
    assert not faults
