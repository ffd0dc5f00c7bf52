"""A graph proven against the graph that it was made from: what counts as the other graph's own error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.fold import fold
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification import against_graph, proof
from lora_export.verification.against_graph import GraphReferences
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import Proof, prove

WIDTH, LAYERS, RANK = 256, 2, 2


def tower(path: Path) -> Path:
    """Wide layers, one upon the other."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for layer in range(LAYERS):
        weight = (rng.standard_normal((WIDTH, WIDTH)) / 16).astype(np.float32)
        tensors.append(numpy_helper.from_array(weight, f"l{layer}.weight"))
        names = [f"x{layer}", f"l{layer}.weight"], [f"x{layer + 1}"]
        nodes.append(helper.make_node("MatMul", *names, name=f"l{layer}"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x0", f"x{LAYERS}")]
    graph = helper.make_graph(nodes, "tower", ends[:1], ends[1:], tensors)
    imports = [helper.make_opsetid("", 21)]
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())
    return path


def an_adapter(std: float) -> Adapter:
    rng = np.random.default_rng(1)
    pairs = {
        f"l{layer}": LoraPair(
            a=std * rng.standard_normal((RANK, WIDTH)), b=std * rng.standard_normal((WIDTH, RANK)), scale=1.0
        )
        for layer in range(LAYERS)
    }
    return Adapter(name="a", format="test", pairs=pairs, sha256="0a")


def judged(folder: Path, std: float, strength: float = 1.0) -> Proof:
    """A merge with this strength, judged as one with all of it."""
    base = tower(folder / "tower.onnx")
    model = ir.load(base)
    found = find_sites(model)
    fold(model, found, plan.make([an_adapter(std)], found.specs, strengths=[strength]))
    save_graph(model, folder, "merged.onnx")
    return prove(OnnxRunner(folder / "merged.onnx"), GraphReferences.open(base, "merged", [an_adapter(std)]))


def test_a_right_merge_of_an_adapter_that_outweighs_the_weights_is_not_blamed_for_the_digits_that_any_merge_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heavy = 1.0
    verdict = judged(tmp_path, heavy).verdict
    assert verdict.same and against_graph.MERGED in verdict.notes, str(verdict)
    assert judged(tmp_path, heavy, 1.0001).verdict.outcome is Outcome.DIFFERENT
    assert against_graph.MERGED not in judged(tmp_path, 0.02).verdict.notes
    monkeypatch.setattr(proof, "differs_in_precision_alone", lambda _: False)
    assert judged(tmp_path, heavy).verdict.outcome is Outcome.DIFFERENT
