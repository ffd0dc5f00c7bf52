"""What a candidate records: it explains a verdict, and changes none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from xxhash import xxh3_128

import lora_export as le
from lora_export.api.verify_record import ComparedWith, explain_by_record
from lora_export.artifacts.artifact import WrittenRecord
from lora_export.formats.contract import version_of
from lora_export.lora import Adapter, LoraPair
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


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_known_cause_silences_guesses(place: Path, tmp_path: Path, is_recorded: bool) -> None:
    """Half the weight looks like a scale of 2 that was left out; the record states what it is."""
    graph = onnx.load(place / "m.onnx")
    if not is_recorded:
        del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "m.onnx")
    result = le.verify(tmp_path / "m.onnx", MODEL, adapters=place / "adapter", weights=[2.0])
    assert result.exit_code == 4 and bool(result.verdict.recorded) is is_recorded
    assert "0.5 times the correct strength" in str(result)
    assert ("as if" in str(result)) is not is_recorded


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


@pytest.mark.slow
def test_a_damaged_record_explains_nothing(place: Path, tmp_path: Path) -> None:
    le.export_torchscript(MODEL, tmp_path / "m.pt", adapters=place / "adapter", verify=False)
    script = torch.jit.load(tmp_path / "m.pt")
    inputs = {"inputs": ["rows", "weights"]}
    for adapters, known in ((3, False), ([{"name": "fr", "sha256": "00"}], True)):
        extra = {"lora_export.json": json.dumps(inputs | {"adapters": adapters})}
        torch.jit.save(script, tmp_path / "m.pt", _extra_files=extra)
        wrong = le.verify(tmp_path / "m.pt", MODEL)
        assert wrong.exit_code == 4 and bool(wrong.verdict.recorded) is known


# --- the sentences, by hand-made records ---

FR, DE = (hashlib.sha256(name.encode()).hexdigest() for name in ("fr", "de"))
PAIR = LoraPair(a=np.ones((1, 2)), b=np.ones((2, 1)), scale=1.0)


def adapter(name: str, sha256: str, **more: Any) -> Adapter:
    return Adapter(name, "peft", {"q": PAIR}, sha256=sha256, **more)


def entry(name: str, sha256: str, weight: float = 1.0) -> dict[str, Any]:
    return {"name": name, "format": "peft", "sha256": sha256, "weight": weight}


def record(*adapters: dict[str, Any], mode: str = "merged", **more: Any) -> WrittenRecord:
    by_row = [one["name"] for one in adapters] if mode == "rows" else None
    content = {"adapters": list(adapters), "settings": {"lora": mode}, **more}
    return WrittenRecord(content, adapters, by_row)


def given(*adapters: Adapter, weights: tuple[float, ...] = (), **more: Any) -> ComparedWith:
    return ComparedWith(adapters, weights or (1.0,) * len(adapters), **more)


BOTH = record(entry("fr", FR), entry("de", DE))
ROWS = record(entry("fr", FR), entry("de", DE), mode="rows")
INPUTS = record(entry("fr", FR), entry("de", DE), mode="inputs")


@pytest.mark.parametrize(
    ("recorded", "compared", "sentences"),
    [
        (WrittenRecord(), given(), ()),
        (BOTH, given(adapter("x", FR), adapter("y", DE)), ()),
        (BOTH, given(), ("You gave no adapters=; this file contains `fr` and `de`.",)),
        (record(), given(adapter("fr", FR)), ("You gave `fr`; this file contains no adapter.",)),
        (BOTH, given(adapter("fr", FR)), ("You gave `fr`; this file contains `fr` and `de`.",)),
        (record(entry("de", DE)), given(adapter("fr", FR)), ("You gave `fr`; this file contains `de`.",)),
        (
            record(entry("fr", FR, 0.5)),
            given(adapter("fr", FR)),
            ('You gave `fr` the weight 1; this file contains it with the weight 0.5 (weights="0.5").',),
        ),
        (
            record(entry("a", DE)),
            given(adapter("a", FR)),
            (f"You gave `a` (SHA-256 {FR[:12]}…); this file contains `a` (SHA-256 {DE[:12]}…).",),
        ),
        # an adapter that the base had already
        (BOTH, given(adapter("de", DE), base_record=record(entry("fr", FR))), ()),
        # the model and the file to judge, swapped
        (
            WrittenRecord(),
            given(adapter("fr", FR), base_record=record(entry("fr", FR))),
            ("The model that it was compared with contains `fr` already. Did you swap the two?",),
        ),
        # by row
        (ROWS, given(adapter("fr", FR), adapter("de", DE)), ()),
        (ROWS, given(adapter("de", DE), adapter("fr", FR)), ("You gave `de` and `fr`; this file contains them in",)),
        (ROWS, given(adapter("fr", FR), adapter_id=2), ("You gave `fr`; this file contains `de`.",)),
        (ROWS, given(adapter("de", DE), adapter_id=2), ()),
        (ROWS, given(adapter_id=0), ()),
        # as inputs
        (INPUTS, given(), ()),
        (INPUTS, given(adapter("fr", FR)), ("This file takes adapters as inputs. You gave no onnx_adapter=",)),
        (INPUTS, given(adapter("fr", FR), adapter_file=Path("fr.x"), adapter_version=version_of(FR)), ()),
        (
            INPUTS,
            given(adapter("fr", FR), adapter_file=Path("x.y"), adapter_version=version_of(DE)),
            ("You gave `fr`; this file contains `de`.",),
        ),
        # as inputs of a program, which get the adapter that is given
        (INPUTS, given(adapter("x", "99" * 32), fills_inputs=True), ()),
        (
            INPUTS,
            given(adapter("fr", FR), adapter_file=Path("x.y"), fills_inputs=True),
            ("You gave `fr`; this file contains `x.y`.",),
        ),
        # in slots
        (record(entry("fr", FR), mode="slots"), given(adapter("x", FR)), ()),
        # the base, by the hash of the model's weights
        (record(base={"sha256": "ab" * 32}), given(fingerprint="ab" * 32), ()),
        (record(base={"sha256": "ab" * 32}), given(fingerprint="cd" * 32), ("This file was made from another base: ",)),
        (record(base={"sha256": "ab" * 32}), given(), ()),
    ],
)
def test_a_disagreement_is_a_sentence(
    recorded: WrittenRecord, compared: ComparedWith, sentences: tuple[str, ...]
) -> None:
    found = explain_by_record(recorded, compared)
    assert len(found) == len(sentences)
    for line, expected in zip(found, sentences, strict=True):
        assert line.startswith(expected)


def test_a_new_head_makes_no_other_base() -> None:
    compared = given(adapter("fr", FR, replaced={"head.weight": np.ones(2)}), fingerprint="cd" * 32)
    assert explain_by_record(record(entry("fr", FR), base={"sha256": "ab" * 32}), compared) == ()


def test_another_base_is_found_by_the_hash_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"weights")
    right, wrong = ({"m.safetensors": {"xxh3_128": xxh3_128(text).hexdigest()}} for text in (b"weights", b"others"))
    for base in (tmp_path, tmp_path / "m.safetensors"):
        assert explain_by_record(record(base=right), given(base=base)) == ()
        (line,) = explain_by_record(record(base=wrong), given(base=base))
        assert line.startswith("This file was made from another base: its m.safetensors has the xxh3_128 ")


def test_a_record_leads_to_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    hostile = record(base={"../secret": {"sha256": "ab" * 32}, str(tmp_path / "secret"): {"sha256": "ab" * 32}})
    assert explain_by_record(hostile, given(base=tmp_path / "base")) == ()


def test_a_hostile_record_is_cut_and_does_not_fail() -> None:
    many = [entry(f"adapter {number}", f"{number}") for number in range(100)] + [{"sha256": ""}]
    (line,) = explain_by_record(record(*many), given())
    assert line.endswith("`adapter 7` and 93 more.")
    odd = record({"name": ["x"], "sha256": "zz", "weight": "much"}, mode="inputs", base=[])
    explain_by_record(odd, given(adapter_file=Path("x"), adapter_version=1))
