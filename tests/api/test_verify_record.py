"""What a candidate records: it explains a verdict, and changes none."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import torch

import lora_export as le
from support.api import MODEL


def test_why_begins_with_what_the_file_records(place: Path, tmp_path: Path) -> None:
    reports = [tmp_path / f"v.{suffix}" for suffix in ("json", "xml", "html")]
    result = le.verify(place / "m.onnx", MODEL, reports=reports)
    sentence = "You gave no adapters=; this file contains `adapter`."
    assert result.exit_code == 4 and result.verdict.recorded == (sentence,)
    assert str(result).splitlines()[1] == f"  - {sentence}"
    assert json.loads(reports[0].read_text())["recorded"] == [sentence]
    assert f'type="different">{sentence}\n' in reports[1].read_text()
    why = reports[2].read_text().partition("<h2>Why</h2>")[2]
    assert why.partition("<p")[2].startswith(f' class="first">{sentence}</p>')


def test_a_wrong_weight_of_a_merged_file_is_named(place: Path, tmp_path: Path) -> None:
    report = tmp_path / "v.xml"
    result = le.verify(
        place / "merged.safetensors",
        base=place / "base.safetensors",
        adapters=place / "adapter",
        weights=[0.5],
        reports=[report],
    )
    sentence = 'You gave `adapter` the weight 0.5; this file contains it with the weight 1 (weights="1").'
    assert str(result).splitlines()[1] == f"  {sentence}" and sentence in report.read_text()


def test_a_record_changes_no_verdict(place: Path, tmp_path: Path) -> None:
    """A right graph with a record of another adapter is the same, and a wrong one without a record is different."""
    graph = onnx.load(place / "m.onnx")
    onnx.helper.set_model_props(graph, {"lora_export": '{"adapters": [{"name": "other", "sha256": "00"}]}'})
    onnx.save(graph, tmp_path / "m.onnx")
    right = le.verify(tmp_path / "m.onnx", MODEL, adapters=place / "adapter")
    assert right and right.verdict.recorded == ()
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "m.onnx")
    wrong = le.verify(tmp_path / "m.onnx", MODEL)
    assert wrong.exit_code == 4 and wrong.verdict.recorded == ()


def test_a_damaged_record_explains_nothing(place: Path, tmp_path: Path) -> None:
    le.export_torchscript(MODEL, tmp_path / "m.pt", adapters=place / "adapter", verify=False)
    script = torch.jit.load(tmp_path / "m.pt")
    inputs = {"inputs": ["rows", "weights"]}
    for adapters, known in ((3, False), ([{"name": "fr", "sha256": "00"}], True)):
        extra = {"lora_export.json": json.dumps(inputs | {"adapters": adapters})}
        torch.jit.save(script, tmp_path / "m.pt", _extra_files=extra)
        wrong = le.verify(tmp_path / "m.pt", MODEL)
        assert wrong.exit_code == 4 and bool(wrong.verdict.recorded) is known
