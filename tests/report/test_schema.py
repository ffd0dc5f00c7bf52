"""A verdict's document follows its schema, and the schema describes every field."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lora_export import cli
from lora_export.report.json_document import document_of_proof
from lora_export.runtime import torch_runners
from lora_export.verification.parity import Verdict, judge
from lora_export.verification.proof import Proof
from support import FACTORIES
from support.verdicts import ABOUT, AS_DOCUMENT, DIFFERENT, LAYERS, NOTHING, ON_CPU, SAME, STRAYED, UNDECIDED, case

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
