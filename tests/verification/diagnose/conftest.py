"""One case on one thread: every case shows the fault, and the modules are tiny.

PyTorch does not run again with other rounding where outputs differ in precision alone: that decides about the verdict.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lora_export.models import model
from lora_export.verification import prepared_pytorch


@pytest.fixture(autouse=True)
def _one_case_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(model, "CHECKED_SIZES", model.CHECKED_SIZES[1:2])
    monkeypatch.setattr(prepared_pytorch.PreparedPyTorch, "further_peers", lambda *_: ())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
