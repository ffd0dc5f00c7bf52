"""Losses, and the scores in a model's outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.training.losses import cross_entropy, scores_of, squared_error


def test_squared_error_never_broadcasts() -> None:
    labels = torch.tensor([1.0, 2, 3])
    assert squared_error(torch.tensor([[1.0], [2], [4]]), labels).item() == pytest.approx(1 / 3)
    with pytest.raises(InputRefused, match=r"outputs are \(3, 3\), the labels \(3,\)"):
        squared_error(torch.ones(3, 3), labels)
    with pytest.raises(InputRefused, match=r"outputs are \(1,\), the labels \(3,\)"):
        squared_error(torch.ones(1), labels)


def test_cross_entropy_takes_one_label_a_row_or_a_token() -> None:
    even = torch.zeros(2, 3, 4)
    assert cross_entropy(even[:, 0], torch.tensor([0, 3])).item() == pytest.approx(np.log(4))
    one_wrong = even.clone()
    one_wrong[0, 0, 0] = 100
    assert cross_entropy(one_wrong, torch.tensor([[-100, 1, 2], [3, 0, 1]])).item() == pytest.approx(np.log(4))
    with pytest.raises(InputRefused, match="there is a label 4, but the model scores 4 classes"):
        cross_entropy(even[:, 0], torch.tensor([0, 4]))
    with pytest.raises(InputRefused, match=r"scores are \(2, 3, 4\), the labels \(2,\)"):
        cross_entropy(even, torch.tensor([0, 1]))


def test_scores_are_found_in_a_models_outputs() -> None:
    scores = torch.ones(2)
    for outputs in (scores, (scores, None), {"hidden": None, "logits": scores}, {"first": scores, "second": None}):
        assert scores_of(outputs) is scores
    for nothing in (None, {}, [], ("text",)):
        with pytest.raises(InputRefused, match="where a tensor of scores is needed"):
            scores_of(nothing)
