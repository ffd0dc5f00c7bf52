"""Graphs whose rows choose their adapters: what a proof of single adapters would not notice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

import lora_export as le
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.lora import Adapter
from lora_export.verification.parity import Outcome
from lora_export.verification.row_proofs import several_on_row
from support.graphs import an_adapter
from support.small_graphs import PAIR

INPUTS = {"input": torch.randn(4, 3, generator=torch.Generator().manual_seed(0))}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2))


def adapters() -> list[Adapter]:
    return [an_adapter({"0": PAIR}, name="one"), an_adapter({"0": replace(PAIR, b=-2 * PAIR.b)}, name="two")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.onnx"
    result = le.export_onnx((net(), INPUTS), path, adapters=adapters(), lora="rows", per_row=2)
    assert result.proofs is not None and result.proofs.mixed is not None
    assert any("1+2" in case.name for case in result.proofs.mixed.cases)
    return path


def with_reversed_rows(graph: Path, name: str, target: Path) -> Path:
    """The graph whose rows take what the input has for the rows at the other end of the batch."""
    model = load_graph(graph)
    value = next(given for given in model.graph.inputs if given.name == name)
    bounds = [ir.tensor([number], ir.DataType.INT64) for number in (-1, -(2**31), 0, -1)]
    constants = [ir.node("Constant", [], {"value": bound}) for bound in bounds]
    reverse = ir.node("Slice", [value, *(node.outputs[0] for node in constants)])
    for reader, index in list(value.uses()):
        reader.replace_input_with(index, reverse.outputs[0])
    reverse.replace_input_with(0, value)
    model.graph.insert_before(model.graph[0], [*constants, reverse])
    ir.save(model, target)
    return target


def test_each_adapter_is_on_a_row_once_and_then_again() -> None:
    assert several_on_row(3, 2) == ((1, 2), (0.75, -0.5))
    assert several_on_row(2, 5) == ((1, 2, 1, 2, 1), (0.75, -0.5, 0.375, 0.75, -0.5))


def test_a_right_graph_is_same(exported: Path) -> None:
    assert le.verify(exported, (net(), INPUTS), adapters=adapters())


@pytest.mark.parametrize("name", ["adapter_ids", "adapter_scales"])
def test_exchanged_rows_are_different(exported: Path, name: str, tmp_path: Path) -> None:
    wrong = with_reversed_rows(exported, name, tmp_path / "wrong.onnx")
    result = le.verify(wrong, (net(), INPUTS), adapters=adapters())
    assert result.proof is not None and result.proof.verdict.outcome is Outcome.DIFFERENT
    assert {reason.case.split(",")[0] for reason in result.proof.verdict.reasons} == {"mixed batches"}
