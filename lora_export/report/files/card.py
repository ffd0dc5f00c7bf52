"""Markdown: a section for the page of a model, with the verdict, what was compared, and how to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lora_export.report.github import safe_markdown
from lora_export.report.html_context import adapters_of, candidate_name, files
from lora_export.report.json_document import AnyProof, document_of_proof

SUFFIX = ".md"
PURPOSE = "a section for a model's page"
COMPARED = {
    True: "Every changed weight was compared with W + s·BA in fp64, and all other tensors with the bytes of the base.",
    False: "It was run beside the PyTorch model with the adapters attached. The reference is fp64, and the check was "
    "shown to detect a missing adapter and a scale × 1.1.",
}


def of_proof(proof: AnyProof) -> str:
    """The verdict as a section of Markdown."""
    document, about = document_of_proof(proof), proof.about
    lines = [
        "## Proof",
        "",
        f"{safe_markdown(candidate_name(about))}: **{proof.verdict.headline}**",
        "",
        COMPARED["weights" in document],
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


def _table(about: Mapping[str, Any]) -> Iterator[str]:
    rows = [row for row in files(about) if row[0] != "adapter"]
    for one in adapters_of(about):
        rows.append((f"adapter × {one.get('weight', 1):g}", str(one.get("name")), str(one.get("sha256"))))
    yield "| | | SHA-256 |"
    yield "|---|---|---|"
    for what, name, digest in rows:
        yield f"| {safe_markdown(what)} | {safe_markdown(name)} | `{digest}` |"


def _how(command: Any, version: str) -> Iterator[str]:
    yield f"By lora-export{' ' + version if version else ''}:"
    if isinstance(command, list):
        yield from ("", "```sh", shlex.join(map(str, command)).replace("```", ""), "```")
