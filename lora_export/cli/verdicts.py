"""Verdicts as the command line shows them: on a screen, as JSON, and as annotations of a GitHub job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.cli.arguments import print_message, wrote
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.errors import count
from lora_export.report import github, json_document
from lora_export.report.console import console
from lora_export.report.verdict_screen import print_headline, print_summary, print_verdict
from lora_export.verification.against_checkpoint import Audit

MOST_ADAPTERS = 4  # of the short screen
MOST_FILES = 3  # of the short screen

if TYPE_CHECKING:
    from lora_export.api.publish import ExportProofs, ExportResult
    from lora_export.api.verify import Verification
    from lora_export.verification.proof import Proof


def show_proof(proof: Proof | Audit | None, name: str = "") -> None:
    """Print the verdict on stdout: on one screen with -v, else in few lines. `name` tells several verdicts apart."""
    if proof is None:
        click.echo("not verified (--no-verify)")
        return
    chosen = verbosity()
    if chosen is Verbosity.FULL:
        if name:
            click.echo(f"{name}:")
        print_verdict(console(), proof)
    elif name or chosen is Verbosity.QUIET:
        print_headline(console(), proof, name)
    else:
        print_summary(console(), proof)


def export_document(result: ExportResult) -> dict[str, Any]:
    """An export as JSON: its output, its proofs, and its files where it has several."""
    proofs, form = result.proofs, json_document.document_of_proof
    proven = {"proof": form(proofs.whole), **proofs.parts(form)} if proofs else {"proof": None}
    files = {"files": [str(path) for path in result.files]} if len(result.files) > 1 else {}
    return {"output": str(result.output), **proven, **files}


def show_export_proofs(proofs: ExportProofs | None) -> None:
    """Print the verdicts of an export on stdout, all of which are `same`."""
    if proofs is None or not (proofs.adapters or proofs.unlike_base is not None):
        show_proof(proofs.whole if proofs else None)
        return
    adapters = list(proofs.adapters.items())
    if len(adapters) > MOST_ADAPTERS and verbosity() is not Verbosity.FULL:
        used = {name: max((f.limit_used for _, f in proof.verdict.measured), default=0.0) for name, proof in adapters}
        adapters.sort(key=lambda named: -used[named[0]])
        adapters = adapters[:MOST_ADAPTERS]
    show_proof(proofs.whole, "the base")
    for name, proof in adapters:
        show_proof(proof, name)
    if more := len(proofs.adapters) - len(adapters):
        click.echo(f"and {count(more, 'adapter')} more, each the same and farther from its limits (-v)")
    if proofs.mixed:
        show_proof(proofs.mixed, "mixed batches")
    if proofs.several:
        show_proof(proofs.several, "several adapters on a row")
    if proofs.moved:
        show_proof(proofs.moved, "replaced adapters")


def show_files(paths: Sequence[Path]) -> None:
    """Print the paths of files that were written, and their sizes. The short screen has the first ones."""
    shown = paths if verbosity() is not Verbosity.SHORT else paths[:MOST_FILES]
    for path in shown:
        wrote(path)
    if more := len(paths) - len(shown):
        click.echo(f"and {count(more, 'more file')} beside it (-v)")


def annotate_github(result: Verification, title: str) -> None:
    """In a GitHub workflow, print annotations on stderr, and summarise the verdict on the run's page."""
    if "GITHUB_ACTIONS" not in os.environ:
        return
    for line in github.workflow_commands(result.proof, title):
        click.echo(line, err=True)
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(page).open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(github.summary(result.proof, title))
        except OSError as error:
            print_message(f"the summary of the run was not written: {error}")
