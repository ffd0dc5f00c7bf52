"""Examples as batches, and losses on them."""

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
    Batch,
    BinaryCrossEntropy,
    CosineError,
    CrossEntropy,
    EncodedRows,
    OwnLoss,
    ReadyBatches,
    SquaredError,
    batch_on_device,
    batches_sha256,
    loss_for,
    read_own_batches,
    refuse_unknown_inputs,
    scores_of,
)
from lora_export.training.records.rows import JsonLines


class Numbers:
    """Encodes `n`."""

    loss = SquaredError()

    def encode(self, row: Any) -> int:
        if row["n"] < 0:
            raise InputRefused("below zero")
        return int(row["n"])

    def collate(self, encoded: Any) -> Batch:
        return Batch({"x": torch.tensor(encoded)}, torch.tensor(encoded))


def test_rows_are_encoded_when_their_batch_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 5}\n{"n": 6}\n{"n": -1}\n{"n": 8}\n')
    encoder = Numbers()
    data = EncodedRows(JsonLines(tmp_path / "a.jsonl"), np.array([1, 2, 3]), encoder)
    assert len(data) == 3 and data.loss is encoder.loss
    assert data.batch([2, 0], epoch=4).labels.tolist() == [8, 6]
    with pytest.raises(InputRefused, match=r"a\.jsonl, line 3: below zero"):
        data.batch([1])


def test_arrays_and_ready_batches_give_their_rows() -> None:
    data = ArrayData({"x": torch.arange(5)}, torch.arange(5) % 2)
    assert isinstance(data.loss, CrossEntropy)
    assert data.batch([4, 1]).inputs["x"].tolist() == [4, 1]
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
    for change in (lambda x: x + 9, lambda x: x.reshape(4, 1), lambda x: x.view(torch.int16)):
        other = read_own_batches("mine.py:make", good)
        other.batches[1].inputs["x"] = change(other.batches[1].inputs["x"])
        assert batches_sha256(other) != batches_sha256(data)


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


def batch(labels: Any, **inputs: Any) -> Batch:
    return Batch(inputs, labels)


def test_squared_error_never_broadcasts() -> None:
    labels, loss = torch.tensor([1.0, 2, 3]), SquaredError()
    assert loss.total(torch.tensor([[1.0], [2], [4]]), batch(labels)).item() == 1
    assert (loss.count(labels), loss.correct(None, batch(labels))) == (3, None)
    with pytest.raises(InputRefused, match=r"outputs are \(3, 3\), the labels \(3,\)"):
        loss.total(torch.ones(3, 3), batch(labels))
    with pytest.raises(InputRefused, match=r"outputs are \(1,\), the labels \(3,\)"):
        loss.total(torch.ones(1), batch(labels))


def test_cross_entropy_takes_one_label_a_row_or_a_token() -> None:
    even, loss = torch.zeros(2, 3, 4), CrossEntropy()
    assert loss.total(even[:, 0], batch(torch.tensor([0, 3]))).item() == pytest.approx(2 * np.log(4))
    one_wrong = even.clone()
    one_wrong[0, 0, 0] = 100
    labels = torch.tensor([[-100, 1, 2], [3, 0, 1]])
    assert loss.total(one_wrong, batch(labels)).item() == pytest.approx(5 * np.log(4))
    assert (loss.count(labels), loss.correct(one_wrong, batch(labels))) == (5, 1)
    nothing = torch.full((2, 3), -100)
    assert loss.total(even, batch(nothing)).item() == 0 and loss.count(nothing) == 0
    with pytest.raises(InputRefused, match="there is a label 4, but the model scores 4 classes"):
        loss.total(even[:, 0], batch(torch.tensor([0, 4])))
    with pytest.raises(InputRefused, match=r"scores are \(2, 3, 4\), the labels \(2,\)"):
        loss.total(even, batch(torch.tensor([0, 1])))
    with pytest.raises(InputRefused, match=r"the labels \(2, 4\)\. Whole numbers are one class .* label is a list"):
        loss.total(even[:, 0], batch(torch.ones(2, 4, dtype=torch.int64)))


def test_several_classes_are_predicted_one_by_one() -> None:
    loss, labels = BinaryCrossEntropy(), torch.tensor([[1.0, 0], [1, 1]])
    scores = torch.tensor([[0.0, 0], [2, -2]])
    wanted = 2 * np.log(2) + np.log(1 + np.exp(-2)) + np.log(1 + np.exp(2))
    assert loss.total(scores, batch(labels)).item() == pytest.approx(wanted)
    assert (loss.count(labels), loss.correct(scores, batch(labels))) == (4, 2)
    with pytest.raises(InputRefused, match=r"scores are \(2, 3\), the labels \(2, 2\)"):
        loss.total(torch.ones(2, 3), batch(labels))


def test_pairs_are_compared_by_the_cosine_of_their_mean_vectors() -> None:
    states = torch.tensor([[[1.0, 0], [9, 9]], [[1, 0], [0, 1]], [[0, 1], [9, 9]], [[1, 0], [0, 1]]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 0], [1, 1]])
    found = CosineError().total({"last_hidden_state": states}, batch(torch.tensor([0.5, 1.0]), attention_mask=mask))
    assert found.item() == pytest.approx(0.25)  # cosines 0 and 1
    with pytest.raises(InputRefused, match="give a base without a head"):
        CosineError().total({"logits": states}, batch(torch.ones(2), attention_mask=mask))


def test_the_type_of_the_labels_chooses_the_loss() -> None:
    assert isinstance(loss_for(torch.tensor([1])), CrossEntropy)
    assert isinstance(loss_for(torch.tensor([1.0])), SquaredError)


def test_scores_are_found_in_a_models_outputs() -> None:
    scores = torch.ones(2)
    for outputs in (scores, (scores, None), {"hidden": None, "logits": scores}, {"first": scores, "second": None}):
        assert scores_of(outputs) is scores
    for nothing in (None, {}, [], ("text",)):
        with pytest.raises(InputRefused, match="where a tensor of scores is needed"):
            scores_of(nothing)
