"""Every figure, as JSON: of a verdict, and of an error that ended the command."""

from __future__ import annotations

import json

from lora_export.report.files import figures
from lora_export.report.json_document import document_of_proof
from lora_export.verification.proof import Proof
from support.verdicts import ABOUT, DIAGNOSIS, DIFFERENT, STRAYED


def test_the_file_has_the_document_of_the_proof() -> None:
    proof = Proof(DIFFERENT, STRAYED, ABOUT, diagnosis=DIAGNOSIS)
    text = figures.of_proof(proof)
    assert text.endswith("}\n") and json.loads(text) == json.loads(json.dumps(document_of_proof(proof)))


def test_an_error_is_its_own_document() -> None:
    assert (
        figures.of_error({"error": "no such file", "exit": 3}, 2.0) == '{\n  "error": "no such file",\n  "exit": 3\n}\n'
    )
