"""JSON documents: every figure, with the schema's name, and valid JSON whatever the values are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lora_export.report.files import write_report
from lora_export.report.json_document import as_dict, document_of_proof
from lora_export.verification.proof import Proof
from support.records import ADAPTER, a_merge_report, a_plan, a_result
from support.verdicts import DIFFERENT, SAME, STRAYED


def test_verdict_is_read_back_from_its_json(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    write_report(path, Proof(DIFFERENT, STRAYED, {"candidate": "model.onnx", "seed": 7}))
    back = json.loads(path.read_text())
    assert back["schema"] == "lora-export/verdict/2"
    assert (back["outcome"], back["exit_code"], back["dtype"]) == ("different", 4, "float32")
    assert back["about"] == {"candidate": "model.onnx", "seed": 7}
    bad = back["comparisons"][1]
    assert (bad["case"], bad["output"], bad["figures"]["error"], bad["figures"]["shape"]) == (
        "bad", "logits", 1.0, [2, 300],
    )  # fmt: skip
    assert (bad["figures"]["relative_to_effect"], bad["figures"]["ratio_limit"]) == (1 / 64, 2.0)
    assert bad["figures"]["worst"] == {"index": [0, 0], "candidate": -1.0, "reference": 0.0}
    assert bad["figures"]["gates"][0] == {"name": "error", "value": 1.0, "allowed": 0.25, "passed": False}
    assert [gate["name"] for gate in bad["figures"]["gates"]] == ["error", "tail", "effect"]
    names = {control["name"]: control["detected"] for control in bad["figures"]["controls"]}
    assert names == {"adapter_off": True, "scale_1.1": True}
    assert back["reasons"][0]["outcome"] == "different"
    assert back["sensitivity"][1] == {"input": "mask", "peer_changed": True, "candidate_changed": False}
    assert back["placement"] == {
        "requested_provider": "CUDAExecutionProvider",
        "compute_nodes": 142,
        "off_provider": [["CPUExecutionProvider", "/layer.141/MatMul", "MatMul"]],
        "nodes": {"CUDAExecutionProvider": 142, "CPUExecutionProvider": 1},
        "options": {},
        "version": "1.31.1",
    }


def test_values_that_are_not_finite_are_null_and_text() -> None:
    merged = a_merge_report(a_result("w", math.nan, relative_change=np.float32("inf")))
    result = as_dict(merged)["results"][0]
    assert result["retention"] is None and result["retention_text"] == "nan"
    assert result["relative_change"] is None and result["relative_change_text"] == "inf"
    assert "noise_text" not in result
    about = document_of_proof(Proof(SAME, about={"loss": [1.0, -math.inf]}))["about"]
    assert about == {"loss": [1.0, None], "loss_text": "[1.0, -inf]"}
    json.dumps([as_dict(merged), about], allow_nan=False)


def test_every_record_names_its_schema() -> None:
    adapter = json.loads(json.dumps(as_dict(ADAPTER), allow_nan=False))
    assert adapter["schema"] == "lora-export/adapter/1"
    assert adapter["pairs"]["q"]["a"] == {"shape": [1, 3], "dtype": "float32"}, "an array is described, not dumped"
    assert adapter["pairs"]["q"]["scale"] == 2.0
    made = json.loads(json.dumps(as_dict(a_plan()), allow_nan=False))
    assert made["schema"] == "lora-export/plan/1"
    assert made["steps"][0]["spec"]["layout"] == "out_in"
    assert "by_weight" not in made, "an index over the steps"
    merged = as_dict(a_merge_report(replaced=("score.weight",)))
    assert merged["schema"] == "lora-export/merge-report/1"
    assert (merged["replaced"], merged["replaced_weights"]) == (1, ["score.weight"])


def test_values_of_other_types_are_converted_or_refused() -> None:
    about = {"path": Path("a/b"), "dtype": np.dtype("int8"), "count": np.int64(3), "names": {"b", "a"}, "on": np.True_}
    assert document_of_proof(Proof(SAME, about=about))["about"] == {
        "path": "a/b", "dtype": "int8", "count": 3, "names": ["a", "b"], "on": True,
    }  # fmt: skip
    with pytest.raises(TypeError, match="a report cannot hold a function"):
        document_of_proof(Proof(SAME, about={"what": a_result}))
