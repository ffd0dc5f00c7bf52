"""Rows of embedding tables that inputs reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.lora import Adapter, TokenRows
from lora_export.models import factory
from lora_export.verification.inputs.row_coverage import RowCoverage


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids)


@pytest.mark.parametrize(
    ("ids", "doubts", "not_judged"),
    [
        ([0, 1], ["words.weight: none of the 2 rows that the adapter brings was looked up"], []),
        ([0, 3], [], ["words.weight: 1 of the 2 rows that the adapter brings. They were not looked up"]),
        ([7, 3], [], []),
    ],
    ids=["none", "some", "all"],
)
def test_rows_that_were_not_looked_up_are_reported(ids: list[int], doubts: list[str], not_judged: list[str]) -> None:
    model = factory.from_module(Words(), {"ids": torch.zeros(2, 2, dtype=torch.int64)})
    rows = TokenRows(np.array([3, 7]), np.ones((2, 2)))
    adapter = Adapter(name="rows", format="test", pairs={}, token_rows={"words.weight": rows}, sha256="00")
    coverage = RowCoverage(model.module, model, [adapter])
    model.module(torch.tensor([ids]))
    assert [doubt.partition(". ")[0] for doubt in coverage.doubts] == doubts
    assert coverage.not_judged == not_judged
