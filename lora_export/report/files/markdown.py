"""The summary of a verdict as Markdown, for a wiki or a pull request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_export.report import github
from lora_export.report.html_facts import candidate_name
from lora_export.verification.against_checkpoint import Audit

if TYPE_CHECKING:
    from lora_export.verification.proof import Proof

SUFFIX = ".md"
PURPOSE = "Markdown"


def require() -> None:
    """Do nothing: Markdown needs no package."""


def of_proof(proof: Proof | Audit) -> str:
    """The summary that GitHub shows of a proof; of a checkpoint its first line."""
    if isinstance(proof, Audit):
        return f"### {proof.headline}\n"
    return github.summary(proof, candidate_name(proof.about))


def of_error(error: Mapping[str, Any], seconds: float) -> str:
    """The message of an error that ended the command."""
    return f"### failed after {seconds:.0f} s\n\n{error['error']}\n"
