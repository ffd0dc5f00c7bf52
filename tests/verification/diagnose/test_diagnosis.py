"""A diagnosis as text."""

from __future__ import annotations

from lora_export.errors import escaped_lines
from lora_export.verification.diagnose.diagnosis import Diagnosis, LayerError


def test_diagnosis_prints_the_module_and_the_reasons() -> None:
    diagnosis = Diagnosis("m", escaped_lines("a", "b"), (LayerError("m", 1.0, 0.1, None),))
    assert str(diagnosis) == "first module that differs: m\n  a\n  b"
    assert str(Diagnosis(None, "c")) == "no module differs\n  c"
