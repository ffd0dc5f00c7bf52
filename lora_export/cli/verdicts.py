"""Verdicts as the command line shows them: on a screen, as JSON, and as annotations of a GitHub job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export import report
from lora_export.cli.arguments import print_message
from lora_export.report import github
from lora_export.verification.against_checkpoint import Audit

if TYPE_CHECKING:
    from lora_export.api.onnx_options import OnnxProofs
    from lora_export.api.verify import Verification
    from lora_export.verification.proof import Proof


def proof_document(proof: Proof | None) -> dict[str, Any] | None:
    """The proof as JSON; None where no proof was requested."""
    if proof is None:
        return None
    return report.document(
        proof.verdict, proof.placement, proof.about, diagnosis=proof.diagnosis, exit_code=proof.exit_code
    )


def show_proof(proof: Proof | None) -> None:
    """Print the verdict on stdout, on one screen."""
    if proof is None:
        click.echo("not verified (--no-verify)")
    else:
        report.print_verdict(report.console(), proof.verdict, proof.placement, proof.diagnosis)


def onnx_proofs_document(proofs: OnnxProofs | None) -> dict[str, Any]:
    """The proofs of an ONNX export as JSON."""
    document: dict[str, Any] = {"proof": proof_document(proofs.whole if proofs else None)}
    if proofs and proofs.unlike_base is not None:
        document["bits_of_base"] = not proofs.unlike_base
        document["adapters"] = {name: proof_document(proof) for name, proof in proofs.adapters.items()}
    if proofs and proofs.mixed:
        document["mixed"] = proof_document(proofs.mixed)
    return document


def show_onnx_proofs(proofs: OnnxProofs | None) -> None:
    """Print the verdicts of an ONNX export on stdout: one screen each."""
    if proofs is None or proofs.unlike_base is None:
        show_proof(proofs.whole if proofs else None)
        return
    named = [("the base", proofs.whole), *proofs.adapters.items()]
    for name, proof in [*named, *([("mixed batches", proofs.mixed)] if proofs.mixed else [])]:
        click.echo(f"{name}:")
        show_proof(proof)


def show_verification(result: Verification) -> None:
    """Print a verdict of `verify` on stdout, on one screen."""
    if isinstance(result.proof, Audit):
        report.print_verdict(report.console(), result.proof)
    else:
        show_proof(result.proof)


def annotate_github(result: Verification, title: str) -> None:
    """In a GitHub workflow, print annotations on stderr. What a model computes is also summarised on the run's page."""
    if "GITHUB_ACTIONS" not in os.environ:
        return
    if isinstance(result.proof, Audit):
        click.echo(github.annotation_of_weights(result.proof, title), err=True)
        return
    proof = result.proof
    for line in github.workflow_commands(proof.verdict, title, proof.diagnosis):
        click.echo(line, err=True)
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(page).open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(github.summary(proof.verdict, proof.placement, result.about, proof.diagnosis, title=title))
        except OSError as error:
            print_message(f"the summary of the run was not written: {error}")
