"""Verdicts as the command line shows them: on a screen, as JSON, and in a GitHub job."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_export.api.publish import ExportProofs, ExportResult
from lora_export.cli import verdicts
from lora_export.verification.against_checkpoint import Audit, AuditedWeight, Fate
from lora_export.verification.parity import Outcome, Verdict
from lora_export.verification.proof import Proof
from support.verdicts import ABOUT, DIAGNOSIS, DIFFERENT, ON_CPU, SAME

AUDIT = Audit(Outcome.DIFFERENT, (AuditedWeight("fc.weight", Fate.CHANGED, Outcome.DIFFERENT, "it is off", 6, 1),))


def a_proof(verdict: Verdict = SAME, **fields: Any) -> Proof:
    return Proof(verdict, ON_CPU, ABOUT, **fields)


def a_verification(proof: Any) -> Any:
    return SimpleNamespace(proof=proof, about=ABOUT)


def exported(proofs: ExportProofs | None, *files: str) -> dict[str, Any]:
    return verdicts.export_document(ExportResult(Path("m"), tuple(map(Path, files)), proofs))


def test_a_proof_is_a_document_with_its_exit_code() -> None:
    document = exported(ExportProofs(a_proof(DIFFERENT, diagnosis=DIAGNOSIS)))["proof"]
    assert (document["outcome"], document["exit_code"], document["diagnosis"]["first"]) == ("different", 4, "encoder.1")
    assert document["placement"]["compute_nodes"] == 142 and document["about"]["seed"] == 3


def test_a_file_without_a_proof_is_said_to_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts.show_proof(None)
    verdicts.show_export_proofs(None)
    assert capsys.readouterr().out == "not verified (--no-verify)\n" * 2


def test_the_files_that_are_not_listed_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in "abcde"]
    for path in paths:
        path.touch()
    verdicts.show_files(paths)
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"wrote {tmp_path / 'c'} (0 bytes)",
        "and 2 more files beside it (-v)",
    ]
    verdicts.show_files(paths[:3])
    assert "more file" not in capsys.readouterr().out


def test_a_verdict_is_printed_with_its_diagnosis(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts.show_proof(a_proof(DIFFERENT, diagnosis=DIAGNOSIS))
    text = capsys.readouterr().out
    assert text.startswith("different") and "encoder.1" in text and "142/142 nodes" in text


def test_swapped_adapters_have_a_verdict_each(capsys: pytest.CaptureFixture[str]) -> None:
    proofs = ExportProofs(a_proof(), {"fr": a_proof(), "de": a_proof()}, mixed=a_proof(), unlike_base=[])
    document = exported(proofs)
    assert (
        list(document) == ["output", "proof", "bits_of_base", "adapters", "mixed"] and document["bits_of_base"] is True
    )
    assert list(document["adapters"]) == ["fr", "de"] and document["adapters"]["fr"]["outcome"] == "same"
    assert exported(ExportProofs(a_proof(), unlike_base=["y"]))["bits_of_base"] is False
    verdicts.show_export_proofs(proofs)
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "the base", "fr", "de", "mixed batches",
    ]  # fmt: skip


def test_one_proof_is_the_whole_document(capsys: pytest.CaptureFixture[str]) -> None:
    proofs = ExportProofs(a_proof())
    assert list(exported(proofs)) == ["output", "proof"]
    assert exported(None, "m", "n") == {"output": "m", "proof": None, "files": ["m", "n"]}
    verdicts.show_export_proofs(proofs)
    assert capsys.readouterr().out.startswith("same")


def test_an_audit_is_printed_as_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts.show_proof(AUDIT)
    assert "fc.weight: different, it is off" in capsys.readouterr().out
    verdicts.show_proof(a_proof())
    assert capsys.readouterr().out.startswith("same")


def test_outside_of_github_nothing_is_annotated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    verdicts.annotate_github(a_verification(a_proof(DIFFERENT)), "m.onnx")
    assert capsys.readouterr() == ("", "") and not (tmp_path / "summary.md").exists()


def test_a_github_job_gets_annotations_and_a_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_bytes(b"before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    verdicts.annotate_github(a_verification(a_proof(DIFFERENT, diagnosis=DIAGNOSIS)), "m.onnx")
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("::error ") and "m.onnx" in printed.err
    assert summary.read_text().startswith("before\n") and "different" in summary.read_text()


def test_an_audit_is_annotated_and_summarised_by_its_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    verdicts.annotate_github(a_verification(AUDIT), "merged")
    printed = capsys.readouterr().err
    assert printed.startswith("::error ") and "fc.weight: different, it is off" in printed
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("### ❌ merged: different\n\ndifferent: 0 of 1 tensor is as it should be\n\n- fc.weight")
    assert "- fc.weight: different, it is off" in summary


def test_a_summary_that_cannot_be_written_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))  # a folder
    verdicts.annotate_github(a_verification(a_proof()), "m.onnx")
    assert "the summary of the run was not written: " in capsys.readouterr().err
