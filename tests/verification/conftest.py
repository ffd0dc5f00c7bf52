"""What proofs do beside the verdict, switched off."""

from __future__ import annotations

import pytest

from lora_export.verification import prepared_pytorch


@pytest.fixture
def undiagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No modules are compared where outputs differ. That takes as long as the verdict, and `diagnose/` tests it.

    One case of some files undoes this, and asserts which module is named.
    """
    monkeypatch.setattr(prepared_pytorch, "diagnose_module", lambda *_, **__: (None, []))
