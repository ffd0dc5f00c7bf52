"""A merge into the weights of an .onnx file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_export as le
from lora_export.errors import MatchError, WrongUsage
from support.api import an_adapter
from support.handmade import graph_file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    an_adapter(tmp_path / "adapter")
    graph_file(tmp_path / "base.onnx", {"dense.weight": np.eye(8, dtype=np.float32)})
    return tmp_path


def test_a_graph_is_merged_into_a_graph(place: Path) -> None:
    result = le.merge(place / "base.onnx", place / "adapter", place / "out.onnx")
    assert result.report is not None and result.report.results[0].weight == "dense.weight"
    assert (place / "out.onnx").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tied": "untie"}, "tied= is for checkpoints: in a graph each layer gets a weight of its own"),
        ({"dtype": "float16"}, "dtype= is for checkpoints: the weights of a graph keep the types"),
        ({"layout": {"a": "out_in"}}, "layout= is for checkpoints: a graph's operators determine the layout"),
        ({"dequantize": True}, "dequantize= is for checkpoints"),
        ({"keep_residual": "r"}, "keep_residual= is for checkpoints"),
        ({"variant": "fp16"}, "variant= is for folders of checkpoints"),
    ],
)
def test_options_of_checkpoints_are_refused(place: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        le.merge(place / "base.onnx", place / "adapter", place / "out.onnx", **options)
    assert not (place / "out.onnx").exists()


def test_a_misfit_raises_and_leaves_nothing(place: Path) -> None:
    graph_file(place / "other.onnx", {"unrelated.weight": np.eye(8, dtype=np.float32)})
    before = sorted(place.iterdir())
    with pytest.raises(MatchError, match="dense"):
        le.merge(place / "other.onnx", place / "adapter", place / "out.onnx")
    assert sorted(place.iterdir()) == before
