"""Each format and variant: merged, as nodes of a graph, and converted. The outcomes are a table in tests/README.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

import lora_export
from lora_export.errors import InputRefused
from support import ROOT, tables
from support.format_examples import EXAMPLES, FormatExample
from support.handmade import graph_file

README, TABLE = ROOT / "tests/README.md", "formats of language models"
NOT_HERE = "not in this test"


def base_of(example: FormatExample, folder: Path) -> Path:
    base = folder / "base"
    base.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in example.base.items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(dict(example.config)))
    return base


def is_right(merged: Path, example: FormatExample) -> bool:
    found = load_file(merged / "model.safetensors")
    return all(np.allclose(found[name], value, rtol=1e-5, atol=1e-5) for name, value in example.merged.items())


def merge(example: FormatExample, folder: Path) -> str:
    layout = {name.removesuffix(".weight"): "out_in" for name, value in example.base.items() if value.ndim == 2}
    base, layouts = base_of(example, folder), {} if example.config else dict.fromkeys(layout, "out_in")
    lora_export.merge(base, example.path, folder / "out", reading=example.reading, layout=layouts)
    return "right" if is_right(folder / "out", example) else "wrong"


def nodes(example: FormatExample, folder: Path) -> str:
    if not example.is_linear or len({value.shape[1] for value in example.base.values()}) != 1:
        return NOT_HERE
    base = base_of(example, folder)
    weights = {name.removesuffix(".weight"): value for name, value in example.base.items()}
    graph = graph_file(folder / "base.onnx", {f"{name}.weight": value.T for name, value in weights.items()})
    reading = example.reading.for_base(base)
    options = {"lora": "nodes", "reading": reading, "verify": False}  # it is compared with the formula below
    result = lora_export.export_onnx(graph, folder / "out.onnx", adapters=example.path, **options)
    x = np.random.default_rng(0).standard_normal((3, next(iter(weights.values())).shape[1])).astype(np.float32)
    outputs = onnxruntime.InferenceSession(str(result.output)).run(None, {"x": x})
    expected = [x @ value.T for value in example.merged.values()]
    agree = all(np.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(outputs, expected, strict=True))
    return "right" if agree else "wrong"


def convert(to: str) -> Callable[[FormatExample, Path], str]:
    def converted(example: FormatExample, folder: Path) -> str:
        base = base_of(example, folder)
        reading = example.reading.for_base(base)
        written = lora_export.convert(example.path, folder / "written", to=to, reading=reading)
        back = FormatExample(written.output, example.base, example.merged, config=example.config)
        (folder / "again").mkdir()
        return merge(back, folder / "again")

    return converted


WAYS = {"merge": merge, "nodes": nodes, "convert to peft": convert("peft"), "convert to mlx": convert("mlx")}


def outcome(name: str, way: str, folder: Path) -> str:
    """right, wrong, or refused with its reason where that is not the table's own."""
    folder.mkdir()
    try:
        return WAYS[way](EXAMPLES[name](folder / "adapter"), folder)
    except InputRefused:
        return "refused"


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_way_has_the_outcome_of_the_table(name: str, tmp_path: Path) -> None:
    found = {way: outcome(name, way, tmp_path / way) for way in WAYS}
    if os.environ.get("LORA_EXPORT_TABLES"):
        recorded = tables.rows(tables.text(README, TABLE)) if name != next(iter(EXAMPLES)) else {}
        tables.put(README, TABLE, tables.table(recorded | {name: found}, "format, variant"))
    assert "wrong" not in found.values()
    assert tables.rows(tables.text(README, TABLE))[name] == found


def test_the_table_has_each_format_once() -> None:
    assert list(tables.rows(tables.text(README, TABLE))) == list(EXAMPLES)
