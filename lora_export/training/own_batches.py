"""Batches and a loss that a function of the user returns: `file.py:factory`, for any module."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_export.errors import InputRefused
from lora_export.models.factory import failures_of_user_code
from lora_export.training.batches import ReadyBatches
from lora_export.training.losses import Batch, OwnLoss


def read_own_batches(source: str, factory: Callable[[], Any]) -> ReadyBatches:
    """Call a factory that returns (batches, loss).

    `batches` are pairs of the inputs of forward, by name, and whatever the loss compares the outputs with. They are
    kept in memory. `loss(outputs, labels)` returns a tensor with one number. Raises InputRefused for anything else.
    """
    with failures_of_user_code(source):
        result = factory()
        made, loss = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
        if not isinstance(made, Iterable) or not callable(loss):
            raise InputRefused(f"{source} must return (batches, loss): pairs of inputs and labels, and a function")
        batches = list(made)
    if not batches:
        raise InputRefused(f"{source} made no batches")
    for number, batch in enumerate(batches, 1):
        if not isinstance(batch, tuple) or len(batch) != 2 or not _are_inputs(batch[0]):
            raise InputRefused(f"{source}: batch {number} is no pair of inputs, by the names of forward, and labels")
    return ReadyBatches([Batch(*batch) for batch in batches], OwnLoss(loss))


def _are_inputs(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) and bool(inputs) and all(isinstance(name, str) for name in inputs)


def batches_sha256(data: ReadyBatches) -> str:
    """The hash of all inputs and labels that are tensors."""
    digest = hashlib.sha256()
    for batch in data.batches:
        for name, value in [*batch.inputs.items(), ("labels", batch.labels)]:
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
