"""Every figure, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_export.report.json_document import AnyProof, document_of_proof

SUFFIX = ".json"
PURPOSE = "every figure"


def of_proof(proof: AnyProof) -> str:
    """The document that `verify` prints as JSON."""
    return as_json(document_of_proof(proof))


def of_error(error: Mapping[str, Any], seconds: float) -> str:  # noqa: ARG001 - the command itself has no duration
    """The document that the command prints as JSON where it fails."""
    return as_json(error)


def as_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"
