"""The weights of a graph beside those of the graph that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.values import initializer_tensors
from lora_export.lora import Adapter, LoraPair
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification.against_graph import GraphReferences
from lora_export.verification.parity import Findings, Outcome
from lora_export.verification.proof import prove
from lora_export.verification.references.compare_tensors import tensors_of_graph
from lora_export.weights.checkpoint import open_checkpoint
from support.handmade import base_file, graph_file

SIZES = {"attn.q": 16, "attn.k": 8, "attn.v": 24, "fc.one": 20, "fc.two": 20}
RNG = np.random.default_rng(0)
WEIGHTS = {f"{name}.weight": RNG.normal(size=(size, 16)).astype(np.float32) for name, size in SIZES.items()}
ADAPTER = Adapter(
    name="a", format="test", sha256="0",
    pairs={
        name: LoraPair(a=RNG.normal(size=(2, 16)), b=RNG.normal(size=(SIZES[name], 2)), scale=0.5)
        for name in ("attn.k", "fc.one")
    },
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A graph whose q, k and v are one matrix, and the checkpoint that names them."""
    packed = np.concatenate([WEIGHTS[f"attn.{name}.weight"] for name in "qkv"]).T
    graph_file(
        tmp_path / "base.onnx",
        {
            "attn.qkv.MatMul.weight": packed,
            "fc.one.weight": WEIGHTS["fc.one.weight"].T,
            "val_7": WEIGHTS["fc.two.weight"].T,
        },
    )
    base_file(tmp_path / "base.safetensors", WEIGHTS)
    return tmp_path / "base.onnx"


def candidate(base: Path, form: str, defect: Callable[[NDArray[Any]], None] | None = None, name: str = "") -> Path:
    """The graph with the adapter in a form, and a defect in one of its tensors."""
    graph = load_graph(base)
    sites = find_sites(graph, open_checkpoint(base.with_suffix(".safetensors")))
    steps = plan.make([ADAPTER], sites.specs)
    (fold_graph if form == "merged" else insert_nodes)(graph, sites, steps)
    path = base.with_name("m.onnx")
    save_graph(graph, base.parent, path.name)
    if defect:
        written = onnx.load(path)
        (tensor,) = [tensor for tensor in written.graph.initializer if tensor.name == name]
        array = numpy_helper.to_array(tensor).copy()
        defect(array)
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        onnx.save(written, path)
    return path


def compared(base: Path, path: Path, form: str) -> Findings:
    checkpoint = open_checkpoint(base.with_suffix(".safetensors"))
    references = GraphReferences.open(base, form, [ADAPTER], checkpoint=checkpoint)
    runner = OnnxRunner(path)
    return references.prepare(runner, references.inputs(runner)).weights


FORMS = pytest.mark.parametrize("form", ["merged", "nodes"])


@FORMS
def test_right_graphs_have_their_weights(form: str, base: Path) -> None:
    found = compared(base, candidate(base, form), form)
    assert not [*found.faults, *found.doubts]
    assert found.notes[0].startswith("3 of the source graph's 3 tensors, 100 % of its numbers, were compared")


def one_number(array: NDArray[Any]) -> None:
    array[3, 18] += 0.1


def the_sign(array: NDArray[Any]) -> None:
    array *= -1


def other_numbers(array: NDArray[Any]) -> None:
    array[:] = np.random.default_rng(1).normal(size=array.shape)


@FORMS
@pytest.mark.parametrize("name", ["attn.qkv.MatMul.weight", "fc.one.weight", "val_7"])
@pytest.mark.parametrize("defect", [one_number, the_sign, other_numbers], ids=lambda each: each.__name__)
def test_wrong_weights_are_found(defect: Callable[[NDArray[Any]], None], name: str, form: str, base: Path) -> None:
    found = compared(base, candidate(base, form, defect, name), form)
    (line,) = found.doubts if defect is other_numbers else found.faults
    assert line.startswith(f"{name}: ")
    assert defect is not one_number or "1 of " in line


def test_a_wrong_weight_is_different_in_the_verdict(base: Path) -> None:
    def tiny(array: NDArray[Any]) -> None:
        array[3, 18] *= 1 + 2**-19  # below what outputs show

    checkpoint = open_checkpoint(base.with_suffix(".safetensors"))
    references = GraphReferences.open(base, "nodes", [ADAPTER], checkpoint=checkpoint)
    verdict = prove(OnnxRunner(candidate(base, "nodes", tiny, "val_7")), references).verdict
    assert verdict.outcome is Outcome.DIFFERENT
    assert {reason.gate for reason in verdict.reasons} == {"weights"}
    assert "val_7: 1 of 320 numbers are not the source graph's" in str(verdict)


def test_a_file_is_mapped_while_its_tensor_is_read(base: Path) -> None:
    """Pages of a mapped file count as memory of the process: they would do so in the whole proof."""
    graph = load_graph(base)
    for tensor in tensors_of_graph(graph):
        assert np.any(tensor.load())
    in_files = [tensor for tensor in initializer_tensors(graph) if isinstance(tensor, ir.ExternalTensor)]
    assert len(in_files) == 3
    assert not any(tensor.raw for tensor in in_files)
