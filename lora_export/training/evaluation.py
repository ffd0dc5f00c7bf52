"""The loss and accuracy of a module on labelled examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lora_export.errors import InputRefused
from lora_export.training.batches import Data, batches, refuse_unknown_inputs
from lora_export.training.data import IGNORED
from lora_export.training.losses import loss_for, module_scores


@dataclass(frozen=True)
class Score:
    """The loss and accuracy of a module on examples, which it need not have been trained on."""

    loss: float
    accuracy: float | None  # correct labels, from 0 to 1; None where values are predicted
    count: int  # labels that were not ignored

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4g} on {self.count:,}"
        return loss if self.accuracy is None else f"accuracy {100 * self.accuracy:.1f} %, {loss}"


def evaluate(module: nn.Module, data: Data, *, batch_size: int = 64, device: str = "cpu") -> Score:
    """Measure loss and accuracy, without dropout and without gradients.

    Moves the module to the device; its train or eval mode is restored afterwards. Raises InputRefused where every
    label is ignored, and for inputs that forward does not take.
    """
    if not len(data.labels) or not (data.labels != IGNORED).any():
        raise InputRefused("there is no labelled example to evaluate on")
    refuse_unknown_inputs(module, data)
    training = module.training
    module.to(device).eval()
    total, correct, count = 0.0, 0, 0
    try:
        with torch.no_grad():
            for inputs, labels in batches(data, batch_size):
                scores = module_scores(module, {name: value.to(device) for name, value in inputs.items()}).cpu()
                counted = torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED
                total += float(loss_for(labels)(scores, labels)) * int(counted.sum())
                count += int(counted.sum())
                if not labels.is_floating_point():
                    correct += int((scores.argmax(-1) == labels)[counted].sum())
    finally:
        module.train(training)
    return Score(total / count, None if data.labels.is_floating_point() else correct / count, count)
