"""A batch of texts in parts with less padding.

A batch is as wide as its longest text, and each shorter one is padded to it. Texts of similar length make narrower
batches. A loss is a sum over examples, so the parts of a batch add up to its loss and its gradients, where the model
computes a text with padding as it does without.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lora_export.errors import RuntimeRefused
from lora_export.training.batches import Batch, Loss, batch_on_device, module_outputs, scores_of
from lora_export.training.records.opening import IGNORED

BY_TOKEN = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})  # (rows, tokens)

# What a part costs beside its tokens, in tokens: operators are called once more, and their products are smaller.
# Measured for MiniLM on the CPU, with larger models below it; an estimate for CUDA.
PART_COST = {"cpu": 48, "cuda": 2048}

# Of the largest score: what rounding makes of another width at most, in fp32; and in last places of a narrower dtype.
MOST_DIFFERENCE, MOST_PLACES = 1e-3, 2


class TextParts:
    """The batches of one model in parts with less padding. Those of a model that computes padding stay whole."""

    def __init__(self, module: nn.Module, loss: Loss, device: torch.device | str):
        self._module, self._loss, self._device = module, loss, torch.device(device)
        self._ignores_padding: bool | None = None  # not known

    def of(self, batch: Batch) -> list[Batch]:
        """The batch as `parts_with_less_padding`, on the device."""
        if self._ignores_padding is False:
            return [batch_on_device(batch, self._device)]
        lengths = text_lengths_of(batch) if self._loss.rows_per_label else []
        parts = parts_with_less_padding(batch, self._loss, self._device.type, lengths)
        if len(parts) > 1 and self._ignores_padding is None:
            self._ignores_padding = ignores_padding(self._module, batch_on_device(batch, self._device), lengths)
        return [batch_on_device(part, self._device) for part in (parts if self._ignores_padding else [batch])]


def ignores_padding(module: nn.Module, batch: Batch, lengths: Sequence[int]) -> bool:
    """Whether a model computes the shortest text of a batch, and one of middle length, alike with and without padding.

    ConvBERT's convolutions read padding, and XLNet's classifier takes the last token for that of the text. BigBird
    attends to all of a short text, and then of each later one: what is run is a copy, with the same tensors. False
    where a module cannot be copied.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    try:
        alone = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()
    except (TypeError, RuntimeError):  # it has a lock or the like, or keeps a result that has a gradient
        return False
    modules, order = repr(alone), sorted(range(len(lengths)), key=lengths.__getitem__)
    rows = [order[0], order[len(order) // 2]]
    try:
        is_alike = all(_is_alike(alone, batch.inputs, row, lengths[row]) for row in rows)
    except RuntimeRefused:  # by the model's code, which may need a least length
        return False
    return is_alike and repr(alone) == modules


def _is_alike(module: nn.Module, inputs: Mapping[str, Tensor], row: int, length: int) -> bool:
    """Whether the scores of one text are those with its padding. Where they are by token, those of padding are not."""
    padded = {name: value[[row]] for name, value in inputs.items()}
    cut = {name: value[:, :length] if name in BY_TOKEN else value for name, value in padded.items()}
    with torch.no_grad():
        expected, found = (scores_of(module_outputs(module, each)) for each in (padded, cut))
    if expected.shape != found.shape:
        expected = expected[:, :length]
    widest = max(torch.finfo(each.dtype).eps for each in (found, *module.parameters()) if each.is_floating_point())
    most = max(MOST_DIFFERENCE, MOST_PLACES * widest) * expected.abs().max()
    return expected.shape == found.shape and bool((expected - found).abs().max() <= most)


def parts_with_less_padding(batch: Batch, loss: Loss, device: str, lengths: Sequence[int]) -> list[Batch]:
    """The rows of a batch in parts that are as wide as their longest text, the one of most tokens first.

    It is the batch itself where nothing is saved: without `attention_mask`, with padding in front, and for losses that
    are no sum over rows. `lengths` are those of `text_lengths_of`.
    """
    if not lengths or not loss.rows_per_label:
        return [batch]
    count = len(lengths) // loss.rows_per_label
    widths = [max(lengths[label::count]) for label in range(count)]  # of the texts of a label
    groups = groups_by_length(widths, PART_COST.get(device, PART_COST["cuda"]) / loss.rows_per_label)
    if len(groups) < 2:
        return [batch]
    parts = [_part(batch, loss, labels, max(widths[label] for label in labels)) for labels in groups]
    return sorted(parts, key=lambda part: -part.inputs["input_ids"].numel())


def groups_by_length(lengths: Sequence[int], group_cost: float) -> list[list[int]]:
    """Items in groups of similar length. A group costs its items times the longest of them, and `group_cost`.

    Of all groupings, one with the least sum. The groups are in the order of their lengths, the longest first.
    """
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    longest = np.array([lengths[item] for item in order])
    # Of the first i items: the least cost, and where their last group begins. Equal lengths are in one group.
    cost, begins = np.zeros(len(order) + 1), np.zeros(len(order) + 1, np.int64)
    starts = np.flatnonzero(np.diff(longest, prepend=longest[:1] + 1))
    for stop in [*starts[1:], len(order)]:
        possible = starts[starts < stop]
        costs = cost[possible] + (stop - possible) * longest[possible] + group_cost
        cost[stop], begins[stop] = costs.min(), possible[costs.argmin()]
    groups, stop = [], len(order)
    while stop:
        groups.append(sorted(order[begins[stop] : stop]))
        stop = begins[stop]
    return groups[::-1]


def text_lengths_of(batch: Batch) -> list[int]:
    """The tokens of each row up to the last one that is no padding, one at least. Empty where rows are no texts."""
    ids, mask = batch.inputs.get("input_ids"), batch.inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.ndim != 2 or ids.shape != mask.shape:
        return []
    rows, width = mask.shape
    for name, value in batch.inputs.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
            return []
        if name not in BY_TOKEN and value.shape[1:2] == (width,):
            return []  # perhaps one value a token
    counts = mask != 0
    if _are_by_token(batch.labels, mask):
        counts = counts | (batch.labels != IGNORED)
    elif batch.labels.shape[1:2] == (width,):
        return []  # perhaps values of tokens, of which none is ignored
    return [int(length) for length in (counts * torch.arange(1, width + 1)).amax(1).clamp(min=1)]


def _are_by_token(labels: Tensor, mask: Tensor) -> bool:
    return labels.shape == mask.shape and not labels.is_floating_point()


def _part(batch: Batch, loss: Loss, labels: list[int], width: int) -> Batch:
    mask = batch.inputs["attention_mask"]
    per_text = len(mask) // loss.rows_per_label
    rows = [label + number * per_text for number in range(loss.rows_per_label) for label in labels]
    inputs = {name: value[rows, :width] if name in BY_TOKEN else value[rows] for name, value in batch.inputs.items()}
    own = batch.labels[labels]
    return Batch(inputs, own[:, :width] if _are_by_token(batch.labels, mask) else own)
