"""Programs that keep state are refused before they run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.models.pt2 import program
from support.programs import export, noise


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


@pytest.mark.parametrize(
    ("decomposed", "problem"),
    [(False, "programs that keep state from run to run"), (True, "no pure function of its inputs")],
)
def test_a_program_that_changes_its_buffers_is_refused(tmp_path: Path, decomposed: bool, problem: str) -> None:
    path = export(Counting(), {"x": noise(2, 4)}, tmp_path / "counting.pt2", decomposed=decomposed)
    with pytest.raises(InputRefused, match=problem):
        program.load_program(path)
