"""What `repr` shows of public values: a line each, without their arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_export as le
from lora_export.lora import LoraPair, TokenRows
from lora_export.notebook import MOST_ROWS, html_table
from support.api import MODEL, an_adapter, base_weights
from support.handmade import graph_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("values")
    an_adapter(folder / "adapter")
    base_weights(folder / "base.safetensors")
    graph_file(folder / "m.onnx", {"up.weight": np.eye(4, dtype=np.float32)})
    le.merge(folder / "base.safetensors", folder / "adapter", folder / "merged.safetensors")
    le.export_torchscript(MODEL, folder / "m.pt", adapters=folder / "adapter", verify=False)
    return folder


@functools.cache
def merged(place: Path) -> object:
    return le.merge(place / "base.safetensors", place / "adapter", place / "again.safetensors", overwrite=True)


def loaded(place: Path) -> object:
    return le.load_adapter(place / "adapter")


def planned(place: Path) -> object:
    return le.merge(place / "base.safetensors", place / "adapter", place / "no", dry_run=True)


@functools.cache
def proven(place: Path) -> Any:
    return le.verify(place / "m.pt", MODEL, adapters=place / "adapter")


@functools.cache
def audited(place: Path) -> object:
    return le.verify(place / "merged.safetensors", base=place / "base.safetensors", adapters=place / "adapter")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (lambda _: LoraPair(a=np.ones((2, 3)), b=np.ones((4, 2)), scale=0.5), "LoraPair(4 x 3, rank 2, scale 0.5)"),
        (lambda _: TokenRows(np.arange(3), np.ones((3, 4))), "TokenRows(3 rows, width 4)"),
        (loaded, "Adapter('adapter', peft, 1 pair, 32 parameters)"),
        (lambda place: le.open_checkpoint(place / "base.safetensors"), "base.safetensors', 2 tensors, "),
        (lambda place: le.inspect(place / "adapter"), "adapter=Adapter('adapter', peft, "),
        (lambda place: le.inspect(place / "m.onnx"), "graph=Sites(1 linear layer: 1 named by "),
        (lambda place: le.inspect(place / "m.onnx"), "), interface=Interface(inputs=1, outputs=1))"),
        (lambda place: le.inspect(place / "merged.safetensors"), "bytes), record=WrittenRecord(adapter))"),
        (merged, "plan=Plan(1 weight changed, 1 kept as it is), report=MergeReport(1 weight merged, "),
        (audited, "Verification(same: 2 of 2 tensors are as"),
        (proven, "Verification(same: error "),
        (lambda place: proven(place).proof, "Proof(same: error "),
    ],
)
def test_the_line_of_a_value_has_no_arrays(place: Path, value: Callable[[Path], object], parts: str) -> None:
    line = repr(value(place))
    assert parts in line and "array" not in line and len(line) < 700


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (loaded, (">Adapter(&#x27;adapter&#x27;, peft, ", ">dense<", ">8 x 8<")),
        (planned, ("1 weight changed", ">dense.weight<", "B A (rank")),
        (merged, ("1 weight merged, ", ">dense.weight<", ">100.0%<")),
        (audited, ('<b style="color: green">same: ', ">dense.weight<", ">changed<")),
        (proven, ('green">same: error', "PyTorch&#x27;s own error")),
        (lambda place: le.verify(place / "m.pt", MODEL), ('red">different', ">error<", ">reason<")),
    ],
)
def test_a_notebook_shows_a_table(place: Path, value: Callable[[Path], Any], parts: tuple[str, ...]) -> None:
    html = value(place)._repr_html_()
    assert [part for part in parts if part not in html] == []


def test_many_rows_are_cut_and_texts_escaped() -> None:
    html = html_table("<script>\n", ("a",), [(f"<{number}>",) for number in range(MOST_ROWS + 2)])
    assert "<script>" not in html and "\\n" in html and "<0>" not in html
    assert html.count("<td") == MOST_ROWS and "and 2 more" in html


def test_a_checker_sees_no_name_that_does_not_exist() -> None:
    import ast

    tree = ast.parse(Path(le.__file__).read_text(encoding="utf-8"))
    assert "__getattr__" not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not hasattr(le, "Generator")
