"""Markdown: a section for the page of a model, with the verdict, what was compared, and how to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lora_export.report.github import safe_markdown
from lora_export.report.html_context import candidate_name, files, named_controls
from lora_export.report.json_document import AnyProof, document_of_proof

SUFFIX = ".md"
PURPOSE = "a section for a model's page"


def of_proof(proof: AnyProof) -> str:
    """The verdict as a section of Markdown."""
    document, about = document_of_proof(proof), proof.about
    lines = [
        "## Proof",
        "",
        f"{safe_markdown(candidate_name(about))}: **{proof.verdict.headline}**",
        "",
        " ".join(_compared(document)),
        "",
        *_table(about),
        *(f"\nNot judged: {safe_markdown(part)}" for part in document["not_judged"]),
        "",
        *_how(about.get("command"), str(about.get("lora_export", ""))),
    ]
    return "\n".join(lines) + "\n"


def of_error(error: Mapping[str, Any], seconds: float) -> str:  # noqa: ARG001 - the signature of a report
    """That nothing was proven, and why."""
    lines = ["## Proof", "", f"Nothing was proven: {safe_markdown(str(error['error']))}", ""]
    return "\n".join([*lines, *_how(error.get("command"), "")]) + "\n"


def _compared(document: Mapping[str, Any]) -> Iterator[str]:
    if "weights" in document:
        yield "Every changed weight was compared with W + s·BA in fp64, and all others with the bytes of the base."
    elif controls := named_controls(document):
        yield f"The outputs were compared with a reference in fp64, and the errors with those of {document['peer']}."
        if detected := ", ".join(one["title"] for one in controls if one["detected"] and not one["missed"]):
            yield f"The check was shown to detect what is wrong on purpose: {detected}."
        if missed := ", ".join(one["title"] for one in controls if one["missed"]):
            yield f"It did not detect: {missed}."


def _table(about: Mapping[str, Any]) -> Iterator[str]:
    yield "| | | SHA-256 |"
    yield "|---|---|---|"
    for what, name, digest in files(about):
        yield f"| {safe_markdown(what)} | {safe_markdown(name)} | `{digest}` |"


def _how(command: Any, version: str) -> Iterator[str]:
    yield f"By lora-export{' ' + version if version else ''}:"
    if isinstance(command, list):
        yield from ("", "```sh", shlex.join(map(str, command)).replace("```", ""), "```")
