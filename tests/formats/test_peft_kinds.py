"""PEFT's kinds of adapters beside LoRA: merged, verified and in graphs, against PEFT's own merge."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import lora_export as le
from lora_export.errors import InputRefused
from support import ROOT, tables
from support.peft_kinds import CASES, LAYOUT, Trained, differences, graph_of, trained

README = ROOT / "tests/README.md"
TABLE = "kinds of PEFT's adapters"
NOT_HERE = "not in this test"  # layers that are not linear


def merge(one: Trained, folder: Path) -> str:
    le.merge(one.base, one.adapter, folder / "out.safetensors", layout=LAYOUT)
    found = differences(one, folder / "out.safetensors")
    assert found
    return "right" if max(found.values()) < 3e-6 else "wrong"


def verify(one: Trained, folder: Path) -> str:
    result = le.verify(folder / "out.safetensors", base=one.base, adapters=one.adapter, layout=LAYOUT)
    return "right" if result else "wrong"


def in_graph(lora: str, one: Trained, folder: Path) -> str:
    names = [name for name in one.changed if name.removesuffix(".weight") in LAYOUT]
    if names != one.changed:
        return NOT_HERE
    graph = graph_of(folder / "base.onnx", one, names)
    options = {"adapters": one.adapter, "lora": lora, "verify": False}  # PEFT's merge judges it
    result = le.export_onnx(graph, folder / f"{lora}.onnx", **options)
    session = onnxruntime.InferenceSession(str(result.output))
    rng, ports = np.random.default_rng(0), session.get_inputs()
    inputs = {port.name: rng.random((2, port.shape[1]), np.float32) for port in ports}
    expected = [inputs[f"x_{name}"] @ one.merged_in_out(name) for name in names]
    outputs = zip(session.run(None, inputs), expected, strict=True)
    return (
        "right" if all(np.allclose(ours, right, atol=3e-5 * abs(right).max()) for ours, right in outputs) else "wrong"
    )


def merged_graph(one: Trained, folder: Path) -> str:
    return in_graph("merged", one, folder)


def nodes(one: Trained, folder: Path) -> str:
    return in_graph("nodes", one, folder)


WAYS = {"merge": merge, "verify": verify, "graph, merged": merged_graph, "graph, nodes": nodes}


def outcome(way: str, one: Trained, folder: Path) -> str:
    try:
        return WAYS[way](one, folder)
    except InputRefused:
        return "refused"


@pytest.mark.parametrize("name", CASES)
def test_each_way_has_the_outcome_of_the_table(tmp_path, name):
    one = trained(CASES[name], tmp_path)
    found = {way: outcome(way, one, tmp_path) for way in WAYS}
    if os.environ.get("LORA_EXPORT_TABLES"):
        recorded = tables.rows(tables.text(README, TABLE)) if name != next(iter(CASES)) else {}
        tables.put(README, TABLE, tables.table(recorded | {name: found}, "kind"))
    assert "wrong" not in found.values()
    assert tables.rows(tables.text(README, TABLE))[name] == found
