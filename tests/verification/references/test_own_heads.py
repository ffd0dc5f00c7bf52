"""The model with as many labels as an adapter's head."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lora_export.lora import LoraPair
from lora_export.models.factory import from_module
from lora_export.verification.references.own_heads import with_labels
from support.graphs import an_adapter

PAIR = LoraPair(a=[[1, 2, 3]], b=[[1], [2], [3]], scale=1.0)


def test_the_model_gets_the_labels_and_shares_all_else() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model = from_module(module, {"input": torch.ones(2, 3)})
    replaced = {"1.weight": np.ones((5, 3), np.float32), "1.bias": np.ones(5, np.float32)}
    resized = with_labels(model, [an_adapter({"0": PAIR}, replaced=replaced)])
    assert resized.module(torch.ones(2, 3)).shape == (2, 5) and module(torch.ones(2, 3)).shape == (2, 2)
    assert torch.equal(resized.module[1].weight, module[1].weight[[0, 1, 0, 1, 0]])
    assert resized.module[0].weight is model.module[0].weight
    assert with_labels(model, [an_adapter({"0": PAIR})]) is model
