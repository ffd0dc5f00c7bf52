"""What the metadata of a graph made with `lora="rows"` records: its adapters, and the labels of their heads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.storage.json_files import parse_json

ROW_ADAPTERS_KEY = "lora_export.rows"  # of the adapters' names, in the metadata of a graph made with `lora="rows"`
ADAPTER_IDS = "adapter_ids"  # the input of such a graph: one adapter per row of the batch
ADAPTER_SCALES = "adapter_scales"  # its input where a row has several adapters: a factor for each
ROW_INPUTS = (ADAPTER_IDS, ADAPTER_SCALES)
# The logit of a label that the head of a row's adapter does not have. Every float type holds it (bfloat16 as -9984),
# and its softmax and sigmoid are 0.
ABSENT_LABEL = -10000.0


@dataclass(frozen=True)
class RowAdapters:
    """The adapters that rows may choose from, and for each output of logits how many labels each id has.

    `labels` has the output's name and one count for each id, the base's first. It is empty where no adapter has a head
    of its own. `per_row` is the number of adapters on one row.
    """

    names: Sequence[str]
    labels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    per_row: int = 1

    def __str__(self) -> str:
        """The JSON that a graph's metadata holds."""
        heads = {"labels": dict(self.labels), "absent_label": ABSENT_LABEL} if self.labels else {}
        several = {"per_row": self.per_row} if self.per_row > 1 else {}
        return json.dumps({"adapters": list(self.names), **heads, **several})

    def own_labels(self, outputs: Mapping[str, NDArray[Any]], number: int) -> dict[str, NDArray[Any]]:
        """The outputs of a batch whose rows all have this id, without the labels that its head does not have.

        An output keeps all labels where one of those that are absent has another value than ABSENT_LABEL.
        """
        counts = {name: own[number] for name, own in self.labels.items()}
        return {name: without_absent(value, counts.get(name)) for name, value in outputs.items()}


def without_absent(logits: NDArray[Any], count: int | None) -> NDArray[Any]:
    """The first `count` labels (..., labels), where all others are absent; else the logits as they are."""
    if count is None or not logits.ndim or count >= logits.shape[-1]:
        return logits
    absent = logits[..., count:]
    return logits[..., :count] if np.all(absent == np.array(ABSENT_LABEL, logits.dtype)) else logits


def read_row_adapters(metadata: Mapping[str, str], source: str) -> RowAdapters | None:
    """Read the record in a graph's metadata; None without one. Raises InputRefused where it is no JSON object."""
    if ROW_ADAPTERS_KEY not in metadata:
        return None
    record = parse_json(metadata[ROW_ADAPTERS_KEY].encode(), source)
    names = record.get("adapters", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    labels = record.get("labels", {})
    is_valid = isinstance(labels, dict) and all(
        isinstance(counts, list) and [type(count) for count in counts] == [int] * (len(names) + 1)
        for counts in labels.values()
    )
    per_row = record.get("per_row", 1)
    return RowAdapters(names, labels if is_valid else {}, per_row if type(per_row) is int and per_row > 1 else 1)


def row_inputs(ids: NDArray[np.int64], scales: NDArray[np.float32] | None, per_row: int) -> dict[str, NDArray[Any]]:
    """The graph's inputs that choose adapters. `ids` are [batch] or, with as many `scales`, [batch, per_row].

    With one id for each row of a graph that takes several, the others are those of the base.
    """
    if per_row == 1:
        return {ADAPTER_IDS: ids}
    if ids.ndim == 1:
        others = np.zeros((len(ids), per_row - 1), np.int64)
        ids, scales = np.concatenate([ids[:, None], others], axis=1), np.ones((len(ids), per_row), np.float32)
    assert scales is not None
    return {ADAPTER_IDS: ids, ADAPTER_SCALES: scales}
