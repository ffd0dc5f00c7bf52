"""JSON documents: every figure, with the schema's name, and valid JSON whatever the values are."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from lora_export import cli
from lora_export.report.files import write_report
from lora_export.report.json_document import as_dict, document_of_proof
from lora_export.runtime import torch_runners
from lora_export.verification.parity import Verdict, judge
from lora_export.verification.proof import Proof
from support import FACTORIES
from support.records import ADAPTER, a_merge_report, a_plan, a_result
from support.verdicts import ABOUT, AS_DOCUMENT, DIFFERENT, LAYERS, NOTHING, ON_CPU, SAME, STRAYED, UNDECIDED, case


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


# --- A verdict's document follows its schema, and the schema describes every field. ---


SCHEMA = json.loads(resources.files("lora_export.report").joinpath("verdict-2.schema.json").read_text("utf-8"))


def strict(schema: Any) -> Any:
    """The schema without its permission of further fields."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: strict(part) for name, part in schema.items()}
    return {**parts, "additionalProperties": False} if isinstance(parts.get("properties"), dict) else parts


def validate(document: Any) -> None:
    jsonschema.Draft202012Validator(strict(SCHEMA)).validate(document)


def test_schema_is_valid_and_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema"]["const"] == document_of_proof(Proof(SAME))["schema"]
    assert list(undescribed(SCHEMA, "verdict")) == ["verdict.schema"]


def undescribed(part: Any, path: str) -> Iterator[str]:
    """The fields that have no description, by their path."""
    if isinstance(part, list):
        for each in part:
            yield from undescribed(each, path)
    elif isinstance(part, dict):
        for name, field in part.get("properties", {}).items():
            if "description" not in field:
                yield f"{path}.{name}"
        for name, inner in part.items():
            yield from undescribed(inner, path if name in ("properties", "$defs", "items") else f"{path}.{name}")


@pytest.mark.parametrize("verdict", [SAME, DIFFERENT, UNDECIDED, NOTHING], ids=lambda verdict: str(verdict.outcome))
@pytest.mark.parametrize("placement", [None, ON_CPU, STRAYED])
def test_document_follows_the_schema(verdict: Verdict, placement: Any) -> None:
    validate(
        json.loads(
            json.dumps(document_of_proof(Proof(verdict, placement, ABOUT, diagnosis=AS_DOCUMENT)), allow_nan=False)
        )
    )
    validate(document_of_proof(Proof(verdict, placement, torch_runners.describe_environment())))


def test_values_that_are_not_finite_follow_the_schema() -> None:
    lost: Any = {**AS_DOCUMENT, "layers": [{**LAYERS[0], "error": float("inf")}]}
    document = document_of_proof(Proof(judge([case(1e38)]), diagnosis=lost))
    layer = document["diagnosis"]["layers"][0]
    assert (layer["error"], layer["error_text"]) == (None, "inf")
    validate(document)


@pytest.mark.parametrize(
    "harm",
    [
        lambda document: document.pop("outcome"),
        lambda document: document.update(outcome="fine"),
        lambda document: document.update(schema="lora-export/verdict/1"),
        lambda document: document["comparisons"][0]["figures"].pop("effect"),
        lambda document: document["comparisons"][0]["figures"].update(error="small"),
        lambda document: document["comparisons"][0].update(unheard_of=1),
        lambda document: document["placement"]["off_provider"].append(["too", "few"]),
        lambda document: document["about"]["candidate"]["sha256"].update({"model.onnx": "ab"}),
    ],
)
def test_schema_refuses_other_documents(harm: Any) -> None:
    document = copy.deepcopy(document_of_proof(Proof(SAME, ON_CPU, ABOUT)))
    validate(document)
    harm(document)
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


def test_schema_permits_further_fields() -> None:
    document = document_of_proof(Proof(SAME, ON_CPU, ABOUT)) | {"unheard_of": 1}
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


@pytest.mark.slow
def test_json_option_and_json_report_are_the_same_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{FACTORIES}:spotter"
    assert cli.run(["torchscript", model, "-o", str(tmp_path / "m.pt"), "--no-verify"]) == 0
    capsys.readouterr()
    words = ["verify", str(tmp_path / "m.pt"), "--model", model, "--report", str(tmp_path / "m.json"), "--json"]
    assert cli.run(words) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads((tmp_path / "m.json").read_text())
    assert printed == written
    validate(printed)
    about = printed["about"]
    assert about["command"] == ["lora-export", *words]
    assert list(about["candidate"]["sha256"]) == ["m.pt"]
    assert {"seed", "inputs", "tf32", "torch", "lora_export", "created", "seconds"} <= set(about)
