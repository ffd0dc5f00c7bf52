"""Examples as batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.errors import InputRefused
from lora_export.training.batches import (
    ArrayData,
    EncodedRows,
    ReadyBatches,
    batch_on_device,
    batches_in_order,
    refuse_unknown_inputs,
)
from lora_export.training.losses import Batch, CrossEntropy, OwnLoss, SquaredError
from lora_export.training.records.json_lines import JsonLines


class Numbers:
    """Encodes `n`, and keeps the keys that it gets."""

    loss = SquaredError()

    def __init__(self) -> None:
        self.keys: list[tuple[int, int]] = []

    def encode(self, row: Any) -> int:
        if row["n"] < 0:
            raise InputRefused("below zero")
        return int(row["n"])

    def collate(self, encoded: Any, keys: Any) -> Batch:
        self.keys += keys
        return Batch({"x": torch.tensor(encoded)}, torch.tensor(encoded))


def test_rows_are_encoded_when_their_batch_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 5}\n{"n": 6}\n{"n": -1}\n{"n": 8}\n')
    encoder = Numbers()
    data = EncodedRows(JsonLines(tmp_path / "a.jsonl"), np.array([1, 2, 3]), encoder)
    assert len(data) == 3 and data.loss is encoder.loss
    assert data.batch([2, 0], epoch=4).labels.tolist() == [8, 6]
    assert encoder.keys == [(4, 3), (4, 1)]
    with pytest.raises(InputRefused, match=r"a\.jsonl, line 3: below zero"):
        data.batch([1])


def test_arrays_and_ready_batches_give_their_rows() -> None:
    data = ArrayData({"x": torch.arange(5)}, torch.arange(5) % 2)
    assert isinstance(data.loss, CrossEntropy)
    assert [batch.inputs["x"].tolist() for batch in batches_in_order(data, 2)] == [[0, 1], [2, 3], [4]]
    assert [batch.inputs["x"].tolist() for batch in batches_in_order(data, 2, [4, 1, 0])] == [[4, 1], [0]]
    ready = ReadyBatches([Batch({"x": 1}, "a"), Batch({"x": 2}, "b")], OwnLoss(lambda *_: torch.ones(())))
    assert ready.batch([1]) == Batch({"x": 2}, "b") and len(ready) == 2


def test_only_tensors_move_to_a_device() -> None:
    moved = batch_on_device(Batch({"x": torch.ones(1), "flag": True}, {"any": 1}), "meta")
    assert moved.inputs["x"].device.type == "meta" and moved.inputs["flag"] is True and moved.labels == {"any": 1}


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * x


@pytest.mark.parametrize("names", [["y"], ["x", "y"], []])
def test_inputs_that_forward_does_not_take_are_refused(names: list[str]) -> None:
    data = ArrayData({name: torch.ones(4, 4) for name in names}, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(InputRefused, match=rf"contain {', '.join(names)}; the model's forward takes scale, x"):
        refuse_unknown_inputs(Scaled(), data)
