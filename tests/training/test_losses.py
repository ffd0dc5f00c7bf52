"""Losses, and the scores in a model's outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.training.losses import (
    Batch,
    BinaryCrossEntropy,
    CosineError,
    CrossEntropy,
    SquaredError,
    loss_for,
    scores_of,
)


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
