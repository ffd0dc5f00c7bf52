"""The document is what its schema says, and the schema says every field of it."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lora_export import cli, report
from lora_export.runtime import torch_runners
from lora_export.verification.parity import Verdict, judge
from support import FACTORIES
from support.verdicts import ABOUT, DIAGNOSIS, DIFFERENT, NOTHING, SAME, STRAYED, UNDECIDED, Placed, case

SCHEMA = json.loads(resources.files("lora_export.report").joinpath("verdict-2.schema.json").read_text("utf-8"))


def strict(schema: Any) -> Any:
    """The schema, less its promise that other fields may stand beside those that it names."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    told = {name: strict(part) for name, part in schema.items()}
    return {**told, "additionalProperties": False} if isinstance(told.get("properties"), dict) else told


def validate(document: Any) -> None:
    jsonschema.Draft202012Validator(strict(SCHEMA)).validate(document)


def test_the_schema_is_one_and_explains_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema"]["const"] == report.document(SAME)["schema"]
    figures = SCHEMA["$defs"]["figures"]["properties"]
    unexplained = [n for n, part in figures.items() if "description" not in part and "$ref" not in part]
    assert unexplained == []


@pytest.mark.parametrize("verdict", [SAME, DIFFERENT, UNDECIDED, NOTHING], ids=lambda verdict: str(verdict.outcome))
@pytest.mark.parametrize("placement", [None, Placed(), STRAYED])
def test_a_document_is_what_the_schema_says(verdict: Verdict, placement: Any) -> None:
    validate(json.loads(json.dumps(report.document(verdict, placement, ABOUT, DIAGNOSIS), allow_nan=False)))
    validate(report.document(verdict, placement, torch_runners.describe_environment()))


def test_what_is_not_finite_fits_the_schema_too() -> None:
    lost = {**DIAGNOSIS, "layers": [{**DIAGNOSIS["layers"][0], "error": float("inf")}]}
    told = report.document(judge([case(1e38)]), diagnosis=lost)
    assert (told["diagnosis"]["layers"][0]["error"], told["diagnosis"]["layers"][0]["error_text"]) == (None, "inf")
    validate(told)


@pytest.mark.parametrize(
    "harm",
    [
        lambda told: told.pop("outcome"),
        lambda told: told.update(outcome="fine"),
        lambda told: told.update(schema="lora-export/verdict/1"),
        lambda told: told["comparisons"][0]["figures"].pop("effect"),
        lambda told: told["comparisons"][0]["figures"].update(error="small"),
        lambda told: told["comparisons"][0].update(unheard_of=1),
        lambda told: told["placement"]["off_provider"].append(["too", "few"]),
        lambda told: told["about"]["candidate"]["sha256"].update({"model.onnx": "ab"}),
    ],
)
def test_the_schema_refuses_what_is_none(harm: Any) -> None:
    told = copy.deepcopy(report.document(SAME, Placed(), ABOUT))
    validate(told)
    harm(told)
    with pytest.raises(jsonschema.ValidationError):
        validate(told)


def test_whoever_knows_an_older_schema_can_read_a_newer_document() -> None:
    told = report.document(SAME, Placed(), ABOUT) | {"unheard_of": 1}
    jsonschema.Draft202012Validator(SCHEMA).validate(told)


def test_the_commands_two_documents_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
