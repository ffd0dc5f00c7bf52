"""A small program for the tests of its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.factories import Worded
from support.programs import export, ids, padded


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    inputs = {"ids": ids(2, 5) % 10, "mask": padded(2, 5)}
    return export(Worded(), inputs, tmp_path_factory.mktemp("good") / "good.pt2", dynamic=2)
