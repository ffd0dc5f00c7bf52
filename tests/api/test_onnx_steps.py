"""Proofs of a graph before it is published: as a whole, without adapters, with each, and mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.api.onnx_request import OnnxRequest
from lora_export.api.onnx_steps import base_outputs, insert_and_save, locate_steps, prove_all, record_in, write_graph
from lora_export.api.publish import ExportProofs
from lora_export.errors import Different, MatchError
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.lora import Adapter, TokenRows
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification.against_graph import GraphReferences
from lora_export.verification.proof import Proof
from lora_export.verification.references.base_graph import BaseGraph
from support.api import Recorder
from support.graphs import a_graph, an_adapter, record_of
from support.small_graphs import CLASSIFIER, DELTA, LINEAR, LINEAR_WEIGHT, PAIR, SQUARE
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
        (ExportProofs(Proof(SAME, None, {})), {"outcome": "same"}),
        (
            ExportProofs(Proof(SAME, None, {}), {"fr": Proof(SAME, None, {})}, Proof(SAME, None, {}), []),
            {"outcome": "same", "bits_of_base": True},
        ),
    ],
)
def test_a_file_records_its_proofs(tmp_path: Path, proofs: ExportProofs | None, fields: dict[str, Any]) -> None:
    path = written(tmp_path, options("nodes", FR))
    record_in(path, {"base": {"sha256": "ab"}}, proofs)
    record = record_of(path)
    assert record["base"] == {"sha256": "ab"} and fields.items() <= record["verdict"].items()
    is_swapped = proofs is not None and proofs.unlike_base is not None
    assert ("adapters" in record["verdict"], "mixed" in record["verdict"]) == (is_swapped, is_swapped)


# --- Adapters into a graph in memory, and the graph into a folder. ---


X = np.float32([[1, 2, 3], [0, 1, 0]])
BASE = (X @ np.float32(LINEAR_WEIGHT) + [10, 20]) * [7, 8]
ADAPTED = BASE + X @ DELTA.T * [7, 8]
ADAPTER = an_adapter({"m": PAIR}, name="fr", sha256="00" * 32)


def inserted(lora: str, folder: Path, *adapters: Adapter, targets: tuple[str, ...] = (), **fields: Any) -> list[str]:
    """The names of the files beside the graph."""
    program, wanted = a_graph(LINEAR), options(lora, *adapters, **fields)
    return insert_and_save(program, locate_steps(program, wanted, None), wanted, list(targets), folder)


def test_nodes_compute_the_sum(tmp_path: Path) -> None:
    assert inserted("nodes", tmp_path, ADAPTER) == []
    assert OnnxRunner(tmp_path / "m.onnx").run({"x": X})["y"].tolist() == ADAPTED.tolist()


def test_inputs_take_an_adapters_file(tmp_path: Path) -> None:
    assert inserted("inputs", tmp_path, ADAPTER, weights=[2.0]) == ["fr.onnx_adapter"]
    runner = OnnxRunner(tmp_path / "m.onnx")
    assert runner.run({"x": X})["y"].tolist() == BASE.tolist()
    with_adapter = runner.with_adapter(tmp_path / "fr.onnx_adapter").run({"x": X})["y"]
    assert with_adapter.tolist() == (2 * ADAPTED - BASE).tolist()


def test_targets_get_inputs_for_future_adapters(tmp_path: Path) -> None:
    assert inserted("inputs", tmp_path, targets=("m.weight",)) == []
    with_dora = tmp_path / "dora"
    with_dora.mkdir()
    inserted("inputs", with_dora, targets=("m.weight",), dora=True)
    counts = [len(load_graph(folder / "m.onnx").graph.inputs) for folder in (tmp_path, with_dora)]
    assert counts == [1 + 2, 1 + 3]  # x, A and B; and DoRA's factor


def test_rows_choose_an_adapter_each(tmp_path: Path) -> None:
    assert inserted("rows", tmp_path, ADAPTER) == []
    outputs = OnnxRunner(tmp_path / "m.onnx").with_rows([1, 0]).run({"x": X})["y"]
    assert outputs.tolist() == [ADAPTED[0].tolist(), BASE[1].tolist()]


def test_files_for_slots_have_their_own_heads(tmp_path: Path) -> None:
    heads = {"one": np.float32([[1, 2, 0], [-1, 0, 1]]), "two": np.float32([[3, 0, 1], [1, 1, 1]])}  # (in, out)
    wholes = [{"head.weight": head, "head.bias": np.zeros(3, np.float32)} for head in heads.values()]
    adapters = [an_adapter({"a": SQUARE}, name=n, replaced=own) for n, own in zip(heads, wholes, strict=True)]
    path = written(tmp_path, options("slots", *adapters), CLASSIFIER)
    runner = OnnxRunner(path).with_slot_files({name: tmp_path / f"{name}.onnx_adapter" for name in heads})
    inner = X[:, :2] @ (np.float32([[1, 2], [3, 4]]) + SQUARE.delta().T)
    for slot, head in enumerate(heads.values(), 1):
        assert runner.with_rows([slot]).run({"x": X[:, :2]})["logits"].tolist() == (inner @ head).tolist()


def test_rows_under_a_name_that_no_graph_reads_are_left_out() -> None:
    program = a_graph("g (int64[N] i) => (float[N,1] y) <float[2,1] e.weight = {1,2}> { [e] y = Gather(e.weight, i) }")
    rows = TokenRows(np.array([1]), np.float32([[5]]))
    wanted = options("nodes", an_adapter({}, token_rows={"e.weight": rows, "shared.weight": rows}))
    located = locate_steps(program, wanted, None)
    assert located.plan is not None and [step.weight for step in located.plan.steps] == ["e.weight"]
    with pytest.raises(MatchError, match="shared"):  # which no model's ties explain
        locate_steps(program, wanted, None, is_existing=True)


def test_stages_and_notes_are_reported(tmp_path: Path) -> None:
    seen = Recorder()
    noted = an_adapter({"base_model.m": PAIR}, name="fr")
    program, wanted = a_graph(LINEAR), options("nodes", noted, **seen.callbacks)
    located = locate_steps(program, wanted, None)
    insert_and_save(program, located, wanted, [], tmp_path)
    assert seen.stages == ["finding its weights", "inserting the adapters", "writing"]
    assert seen.messages and all(message.startswith("note: ") for message in seen.messages)


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MatchError, match="elsewhere"):
        locate_steps(a_graph(LINEAR), options("nodes", an_adapter({"elsewhere": PAIR})), None)
    assert locate_steps(a_graph(LINEAR), options("inputs"), None).plan is None


def test_large_weights_are_stored_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.graph.onnx_file import writing

    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 0)
    model = a_graph("g (float[N,64] x) => (float[N,64] y) <float[1] w = {1}> { y = MatMul(x, w) }")
    value = model.graph.initializers["w"]
    value.const_value, value.shape = ir.Tensor(np.ones((64, 64), np.float32), name="w"), ir.Shape([64, 64])
    (name,) = write_graph(model, options("merged"), tmp_path)
    assert name.startswith("m.onnx.") and sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "m.onnx"])
