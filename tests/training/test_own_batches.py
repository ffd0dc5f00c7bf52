"""Batches and a loss that the user's own function makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.training.losses import OwnLoss
from lora_export.training.own_batches import batches_sha256, read_own_batches


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
    with pytest.raises(InputRefused, match=r"the loss of the data's factory failed at .*test_own_batches\.py:\d+"):
        OwnLoss(lambda outputs, labels: outputs - labels).total("text", batch)


def test_the_hash_depends_on_every_batch() -> None:
    data = read_own_batches("mine.py:make", good)
    assert batches_sha256(data) == batches_sha256(read_own_batches("mine.py:make", good))
    data.batches[1].inputs["x"][0, 0] = 9
    assert batches_sha256(data) != batches_sha256(read_own_batches("mine.py:make", good))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: 1 / 0, r"mine\.py:make failed at .*test_own_batches\.py:\d+: ZeroDivisionError"),
        (list, r"must return \(batches, loss\)"),
        (lambda: ([], print), "made no batches"),
        (lambda: ([({"x": 1}, 0), 5], print), "batch 2 is no pair"),
        (lambda: ([(torch.ones(2), 0)], print), "batch 1 is no pair"),
    ],
)
def test_other_results_are_refused(factory: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        read_own_batches("mine.py:make", factory)
