"""A graph without an adapter, judged by the bits of the graph that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.formats.contract import Contract
from lora_export.provenance import CONTRACT_KEY
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays
from lora_export.verification.parity import Case, Findings, Outcome, Sensitivity, Verdict, judge
from lora_export.verification.proof import AGAINST, NODE_BY_NODE, NOT_BY_FP64, UNCHANGED, Proof, prove_by_origin
from support.graphs import a_graph

# Rounds x to multiples of 1/4, as a base in int8 does: far from its fp64, which does not round.
ORIGIN = """
g (float[N,2] x) => (float[N,2] y) <float[1] four = {4}>
{ a = Mul(x, four) b = Round(a) y = Div(b, four) }
"""
# The same with an optional input for an adapter, whose default is zero.
TAKES_ADAPTERS = ORIGIN.replace("<float[1] four = {4}>", "<float[1] four = {4}, float[1] fr = {0}>").replace(
    "(float[N,2] x)", "(float[N,2] x, float[1] fr)"
)
ADDED = TAKES_ADAPTERS.replace("y = Div(b, four)", "c = Div(b, four) y = Add(c, fr)")
X = np.float32([[0.1, 0.6], [1.3, -0.7]])
ROUNDED = np.float64([[0, 0.5], [1.25, -0.75]])


def graph(folder: Path, name: str, text: str) -> Path:
    path, model = folder / name, a_graph(text)
    if "fr" in {value.name for value in model.graph.inputs}:
        model.metadata_props[CONTRACT_KEY] = str(Contract("0" * 16, "", ()))  # declares adapters
    ir.save(model, path)
    return path


def a_case(output: str = "y") -> Case:
    exact = X.astype(np.float64)
    float32 = (exact + np.float64([[1e-3, -1e-3], [1e-3, -1e-3]])).astype(np.float32)
    return Case("first", "x [2, 2]", {output: exact}, {output: float32}, {output: ROUNDED.astype(np.float32)})


def undecided(case: Case) -> Verdict:
    return judge([case], sensitivity=[Sensitivity("x", True, True)], findings=Findings(notes=("a note",)))


def judged(folder: Path, candidate: str, origin: str = ORIGIN, **fields: Any) -> Any:
    case = a_case(**fields)
    runner = OnnxRunner(graph(folder, "candidate.onnx", candidate))
    proof = Proof(undecided(case), inputs={"first": {"x": X}}, cases=(case,))
    found = prove_by_origin(proof, runner, graph(folder, "origin.onnx", origin), lambda graph: graph)
    return None if found is proof else (found.verdict, found.cases)


def test_the_bits_of_the_origin_are_the_same(tmp_path: Path) -> None:
    verdict, (case,) = judged(tmp_path, ADDED)
    assert verdict.outcome is Outcome.SAME and verdict.notes[:3] == (UNCHANGED, NOT_BY_FP64, "a note")
    assert (case.peer, case.reference["y"].tolist(), case.candidate["y"].tolist()) == (
        AGAINST, ROUNDED.tolist(), ROUNDED.tolist(),
    )  # fmt: skip
    assert verdict.sensitivity == (Sensitivity("x", True, True),)


def test_outputs_of_another_name_are_compared_by_order(tmp_path: Path) -> None:
    verdict, (case,) = judged(tmp_path, ADDED, output="logits")
    assert verdict.outcome is Outcome.SAME and list(case.reference) == ["logits"]


def test_a_graph_that_is_far_from_its_origin_is_not_decided(tmp_path: Path) -> None:
    assert judged(tmp_path, ADDED.replace("fr = {0}", "fr = {0.001}")) is None


def test_a_graph_without_adapter_inputs_is_not_decided(tmp_path: Path) -> None:
    assert judged(tmp_path, ORIGIN) is None


def test_a_near_graph_is_the_same_only_where_its_nodes_are(tmp_path: Path) -> None:
    # Below a tenth of PyTorch's error, 1e-3, but other bits without optimisations, too.
    assert judged(tmp_path, ADDED.replace("fr = {0}", "fr = {0.00001}")) is None


# PyTorch's error is 1e-3
@pytest.mark.parametrize(
    ("distance", "dtype", "is_near"),
    [(1e-5, np.float32, True), (1e-2, np.float32, False), (1e-2, ml_dtypes.bfloat16, False)],
)
def test_a_near_graph_whose_nodes_agree_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distance: float, dtype: Any, is_near: bool
) -> None:
    right = OnnxRunner.run

    def fused(runner: OnnxRunner, *arguments: Any) -> Arrays:
        """As if onnxruntime fused nodes of the candidate where it optimises."""
        optimises = runner.session.get_session_options().graph_optimization_level.name != "ORT_DISABLE_ALL"
        nudge = np.float32(distance if optimises and runner.path.name == "candidate.onnx" else 0)
        return {name: (value + nudge).astype(dtype) for name, value in right(runner, *arguments).items()}

    monkeypatch.setattr(OnnxRunner, "run", fused)
    found = judged(tmp_path, ADDED)
    assert (found is not None) is is_near
    if found is not None:
        assert found[0].outcome is Outcome.SAME and found[0].notes[0].startswith(f"{NODE_BY_NODE} (first, y: ")


def test_an_origin_with_other_inputs_or_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"origin\.onnx is not what the candidate was made from: it has other outp"):
        judged(tmp_path, ADDED, ORIGIN.replace(" y", " z"))
    with pytest.raises(InputRefused, match=r"origin\.onnx is not what the candidate was made from: "):
        judged(tmp_path, ADDED, ORIGIN.replace("float[N,2] x", "float[N,2] other").replace("Mul(x", "Mul(other"))
