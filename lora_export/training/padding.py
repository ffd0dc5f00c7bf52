"""A batch of texts in parts with less padding.

A batch is as wide as its longest text, and each shorter one is padded to it. Texts of similar length make narrower
batches. A loss is a sum over examples, so the parts of a batch add up to its loss and its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_export.training.batches import Batch, Loss
from lora_export.training.records.opening import IGNORED

BY_TOKEN = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})  # (rows, tokens)

# What a part costs beside its tokens, in tokens: operators are called once more, and their products are smaller.
# Measured for MiniLM on the CPU, with larger models below it; an estimate for CUDA.
PART_COST = {"cpu": 48, "cuda": 2048}


def parts_with_less_padding(batch: Batch, loss: Loss, device: str) -> list[Batch]:
    """The rows of a batch in parts that are as wide as their longest text, the largest part first.

    It is the batch itself where nothing is saved: without `attention_mask`, with padding in front, and for losses that
    are no sum over rows.
    """
    lengths = _lengths(batch) if loss.rows_per_label else None
    if lengths is None:
        return [batch]
    count = len(lengths) // loss.rows_per_label
    texts = lengths.reshape(loss.rows_per_label, count)  # column i: the texts of label i
    widths = [int(width) for width in texts.amax(0)]
    groups = groups_by_length(widths, PART_COST[device] / loss.rows_per_label)
    return (
        [batch] if len(groups) < 2 else [_part(batch, loss, rows, max(widths[row] for row in rows)) for rows in groups]
    )


def groups_by_length(lengths: Sequence[int], group_cost: float) -> list[list[int]]:
    """Items in groups of similar length. A group costs its items times the longest of them, and `group_cost`.

    Of all groupings, one with the least sum. The groups are in the order of their lengths, the longest first.
    """
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first i items: the least cost, and where the last group begins
    for stop in range(1, len(order) + 1):
        best.append(
            min((best[begin][0] + (stop - begin) * lengths[order[begin]] + group_cost, begin) for begin in range(stop))
        )
    groups, stop = [], len(order)
    while stop:
        begin = best[stop][1]
        groups.append(sorted(order[begin:stop]))
        stop = begin
    return groups[::-1]


def _lengths(batch: Batch) -> Tensor | None:
    """int64 (rows,): the tokens of each row up to the last one that is no padding. None where rows are no texts."""
    ids, mask = batch.inputs.get("input_ids"), batch.inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.ndim != 2 or ids.shape != mask.shape:
        return None
    rows, width = mask.shape
    for name, value in batch.inputs.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
            return None
        if name not in BY_TOKEN and value.shape[1:2] == (width,):
            return None  # perhaps one value a token
    counts = mask != 0
    if _are_by_token(batch.labels, mask):
        counts = counts | (batch.labels != IGNORED)
    return (counts * torch.arange(1, width + 1)).amax(1)


def _are_by_token(labels: Tensor, mask: Tensor) -> bool:
    return labels.shape == mask.shape and not labels.is_floating_point()


def _part(batch: Batch, loss: Loss, labels: list[int], width: int) -> Batch:
    mask = batch.inputs["attention_mask"]
    per_text = len(mask) // loss.rows_per_label
    rows = [label + number * per_text for number in range(loss.rows_per_label) for label in labels]
    inputs = {name: value[rows, :width] if name in BY_TOKEN else value[rows] for name, value in batch.inputs.items()}
    own = batch.labels[labels]
    return Batch(inputs, own[:, :width] if _are_by_token(batch.labels, mask) else own)
