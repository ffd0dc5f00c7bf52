"""SVG: a badge for the page of a model, `lora-export | proven: same`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_export.report.json_document import AnyProof

SUFFIX = ".svg"
PURPOSE = "a badge"
LABEL, LETTER, MARGIN = "lora-export", 6.6, 10  # the width of a letter and of the margins, in pixels
# What it reads and its colour, by the outcome. White on each has a contrast of at least 4.5.
MESSAGES = {
    "same": ("proven: same", "#2b7d32"),
    "different": ("different", "#b3261e"),
    "undecided": ("undecided", "#8a5a00"),
    "error": ("not proven", "#5f6368"),
}
TEMPLATE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{title}">
<title>{title}</title>
<clipPath id="r"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#r)"><rect width="{width}" height="20" fill="{colour}"/>
<rect width="{left}" height="20" fill="#444"/></g>
<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="{label_x}" y="14">{label}</text><text x="{message_x}" y="14">{message}</text></g>
</svg>
"""


def of_proof(proof: AnyProof) -> str:
    """The badge of an outcome."""
    return _badge(str(proof.verdict.outcome))


def of_error(error: Mapping[str, Any], seconds: float) -> str:  # noqa: ARG001 - the signature of a report
    """The badge where nothing was proven."""
    return _badge("error")


def _badge(outcome: str) -> str:
    message, colour = MESSAGES[outcome]
    left, right = (round(len(text) * LETTER + 2 * MARGIN) for text in (LABEL, message))
    return TEMPLATE.format(
        width=left + right, left=left, title=f"{LABEL}: {message}", colour=colour, label=LABEL, message=message,
        label_x=left / 2, message_x=left + right / 2,
    )  # fmt: skip
