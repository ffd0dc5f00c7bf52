"""What several tests share: swapping."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lora_export.models import export
from lora_export.models.load import load_model
from support import FACTORIES

MODEL = f"{FACTORIES}:spotter"


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> Iterator[None]:
    """Every command here exports the same module: what comes before and after that is what is tested."""
    base = load_model(MODEL)
    program = export.to_onnx(base.module, base.example_inputs(), axes=base.axes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "to_onnx", lambda *_, **__: program.clone())
        yield
