"""Loss and accuracy on labelled examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.errors import InputRefused
from lora_export.training.batches import ArrayData
from lora_export.training.evaluation import evaluate


def test_ignored_labels_do_not_count() -> None:
    module = nn.Identity()
    scores = torch.eye(3)[[0, 1, 2, 0]]
    data = ArrayData({"input": scores}, torch.tensor([0, 1, 0, -100]))
    score = evaluate(module, data, batch_size=3)
    assert (score.accuracy, score.count) == (pytest.approx(2 / 3), 3)
    right, wrong = np.log(2 + np.e) - 1, np.log(2 + np.e)
    assert score.loss == pytest.approx((2 * right + wrong) / 3)
    assert str(score).startswith("accuracy 66.7 %, loss 0.8")
    with pytest.raises(InputRefused, match="no labelled example to evaluate on"):
        evaluate(module, ArrayData({"input": scores}, torch.full((4,), -100)))
