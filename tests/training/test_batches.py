"""Examples as batches."""

from __future__ import annotations

from collections.abc import Callable
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
    batches_sha256,
    read_own_batches,
    refuse_unknown_inputs,
)
from lora_export.training.losses import Batch, CrossEntropy, OwnLoss, SquaredError
from lora_export.training.records.text_rows import JsonLines


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


def good() -> Any:
    batches = ((({"x": torch.full((2, 2), float(number), dtype=torch.bfloat16)}), number) for number in range(3))
    return batches, lambda outputs, labels: (outputs - labels).abs().mean()


def test_each_batch_is_an_example_and_the_loss_is_the_users() -> None:
    data = read_own_batches("mine.py:make", good)
    assert len(data) == 3
    batch = data.batch([2])
    assert (batch.inputs["x"][0, 0], batch.labels) == (2, 2)
    assert data.loss.total(torch.ones(4), batch) == 1 and data.loss.count(batch.labels) == 1
    with pytest.raises(InputRefused, match=r"the loss of the data's factory is \(2,\); it must be a tensor"):
        OwnLoss(lambda outputs, labels: torch.ones(2)).total(None, batch)
    with pytest.raises(InputRefused, match=r"the loss of the data's factory failed at .*test_batches\.py:\d+"):
        OwnLoss(lambda outputs, labels: outputs - labels).total("text", batch)


def test_the_hash_depends_on_every_batch() -> None:
    data = read_own_batches("mine.py:make", good)
    assert batches_sha256(data) == batches_sha256(read_own_batches("mine.py:make", good))
    data.batches[1].inputs["x"][0, 0] = 9
    assert batches_sha256(data) != batches_sha256(read_own_batches("mine.py:make", good))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: 1 / 0, r"mine\.py:make failed at .*test_batches\.py:\d+: ZeroDivisionError"),
        (list, r"must return \(batches, loss\)"),
        (lambda: ([], print), "made no batches"),
        (lambda: ([({"x": 1}, 0), 5], print), "batch 2 is no pair"),
        (lambda: ([(torch.ones(2), 0)], print), "batch 1 is no pair"),
    ],
)
def test_other_results_are_refused(factory: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        read_own_batches("mine.py:make", factory)
