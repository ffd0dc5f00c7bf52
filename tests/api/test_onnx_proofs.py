"""Proofs of a graph before it is published: as a whole, without adapters, with each, and mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lora_export.api.onnx_insert import insert_and_save, locate_steps
from lora_export.api.onnx_proofs import base_outputs, prove_all, record_in
from lora_export.api.onnx_request import OnnxProofs, OnnxRequest
from lora_export.errors import Different
from lora_export.lora import Adapter
from lora_export.verification.against_graph import GraphReferences
from lora_export.verification.proof import Proof
from lora_export.verification.references.base_graph import BaseGraph
from support.api import Recorder
from support.graphs import a_graph, an_adapter
from support.small_graphs import LINEAR, PAIR
from support.verdicts import SAME

FR = an_adapter({"m": PAIR}, name="fr", sha256="00" * 32)
DE = an_adapter({"m": PAIR}, name="de", sha256="11" * 32)


def options(lora: str, *adapters: Adapter, **fields: Any) -> OnnxRequest:
    return OnnxRequest("base", Path("m.onnx"), lora=lora, adapters=adapters, **fields)


def written(folder: Path, wanted: OnnxRequest, text: str = LINEAR) -> Path:
    program = a_graph(text)
    insert_and_save(program, locate_steps(program, wanted, None), wanted, [], folder)
    return folder / "m.onnx"


def references(folder: Path, lora: str) -> GraphReferences:
    ir.save(a_graph(LINEAR), folder / "base.onnx")
    return GraphReferences(BaseGraph(folder / "base.onnx", a_graph(LINEAR)), lora)


def test_a_graph_with_nodes_has_one_proof(tmp_path: Path) -> None:
    seen = Recorder()
    wanted = options("nodes", FR, **seen.callbacks)
    base = references(tmp_path, "nodes")
    assert base_outputs([a_graph(LINEAR)], base, wanted) == {}, "nothing compares them"
    proofs = prove_all(written(tmp_path, wanted), base, wanted, {})
    assert proofs.whole.verdict.same
    assert (proofs.adapters, proofs.mixed, proofs.unlike_base) == ({}, None, None)
    assert all(stage.startswith("verifying, ") for stage in seen.stages[-2:])


def test_rows_are_proven_without_with_each_and_mixed(tmp_path: Path) -> None:
    seen = Recorder()
    wanted = options("rows", FR, DE, weights=[1.0, -2.0], **seen.callbacks)
    base = references(tmp_path, "rows")
    before = base_outputs([a_graph(LINEAR)], base, wanted)
    assert before and base_outputs([a_graph(LINEAR)], base, options("rows", FR, verify=False)) == {}
    proofs = prove_all(written(tmp_path, wanted), base, wanted, before)
    assert list(proofs.adapters) == ["fr", "de"] and proofs.mixed is not None
    assert proofs.unlike_base == [] and not seen.messages
    assert "verifying mixed batches" in seen.stages
    assert any(stage.startswith("verifying de, ") for stage in seen.stages)


def test_a_graph_that_is_not_the_base_to_the_bit_is_noted(tmp_path: Path) -> None:
    seen = Recorder()
    wanted = options("inputs", FR, **seen.callbacks)
    base = references(tmp_path, "inputs")
    before = {
        case: {name: np.nextafter(value, np.float32(np.inf)) for name, value in outputs.items()}
        for case, outputs in base_outputs([a_graph(LINEAR)], base, wanted).items()
    }
    proofs = prove_all(written(tmp_path, wanted), base, wanted, before)
    assert proofs.unlike_base
    assert seen.messages[0].startswith("note: without an adapter the graph is the base, but not to the last bit: ")


def test_a_wrong_adapter_is_named(tmp_path: Path) -> None:
    right, wrong = options("rows", FR, DE), options("rows", FR, DE, weights=[1.0, 3.0])
    with pytest.raises(Different, match=r"^de: different"):
        prove_all(written(tmp_path, wrong), references(tmp_path, "rows"), right, {})


def test_a_wrong_base_is_named(tmp_path: Path) -> None:
    wanted = options("rows", FR)
    path = written(tmp_path, wanted, LINEAR.replace("{10,20}", "{10,21}"))
    with pytest.raises(Different, match=r"^the base: different"):
        prove_all(path, references(tmp_path, "rows"), wanted, {})


@pytest.mark.parametrize(
    ("proofs", "fields"),
    [
        (None, {"outcome": "not verified"}),
        (OnnxProofs(Proof(SAME, None, {})), {"outcome": "same"}),
        (
            OnnxProofs(Proof(SAME, None, {}), {"fr": Proof(SAME, None, {})}, Proof(SAME, None, {}), []),
            {"outcome": "same", "bits_of_base": True},
        ),
    ],
)
def test_a_file_records_its_proofs(tmp_path: Path, proofs: OnnxProofs | None, fields: dict[str, Any]) -> None:
    path = written(tmp_path, options("nodes", FR))
    record_in(path, {"base": {"sha256": "ab"}}, proofs)
    text = {entry.key: entry.value for entry in onnx.load(path).metadata_props}["lora_export"]
    record = json.loads(text)
    assert record["base"] == {"sha256": "ab"} and fields.items() <= record["verdict"].items()
    is_swapped = proofs is not None and proofs.unlike_base is not None
    assert ("adapters" in record["verdict"], "mixed" in record["verdict"]) == (is_swapped, is_swapped)
