"""The loss and accuracy of a module on labelled examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from lora_export.errors import InputRefused
from lora_export.options.train import Precision, TrainOptions
from lora_export.training.batches import Data, batch_on_device, batches_in_order, refuse_unknown_inputs
from lora_export.training.compiling import autocast
from lora_export.training.losses import module_outputs
from lora_export.training.processes import is_sharded, move, rank, sum_over_processes, world_size


@dataclass(frozen=True)
class Score:
    """The loss and accuracy of a module on examples, which it need not have been trained on."""

    loss: float
    accuracy: float | None  # correct labels, from 0 to 1; None where values are predicted
    count: int  # labels that were not ignored

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4g} on {self.count:,}"
        return loss if self.accuracy is None else f"accuracy {100 * self.accuracy:.1f} %, {loss}"


def evaluate(
    module: nn.Module,
    data: Data,
    *,
    batch_size: int = 64,
    device: str | torch.device = TrainOptions.device,
    precision: Precision = TrainOptions.precision,
) -> Score:
    """Measure loss and accuracy, without dropout and without gradients. Several processes share the examples.

    `precision` is that of autocast. Moves the module to the device; its train or eval mode is restored afterwards.
    Raises InputRefused where every label is ignored, and for inputs that forward does not take.
    """
    if not len(data):
        raise InputRefused("there is no labelled example to evaluate on")
    refuse_unknown_inputs(module, data)
    own_rows = range(rank(), len(data), world_size())
    modes = {part: part.training for part in module.modules()}
    move(module, device)
    module.eval()
    total, correct, count, has_accuracy = 0.0, 0, 0, True
    try:
        with torch.no_grad():
            for made in batches_in_order(data, batch_size, own_rows):
                batch = batch_on_device(made, device)
                with autocast(device, precision):
                    outputs = module_outputs(module, batch.inputs)
                total += float(data.loss.total(outputs, batch))
                count += data.loss.count(batch.labels)
                right = data.loss.correct(outputs, batch)
                has_accuracy = has_accuracy and right is not None
                correct += right or 0
            # A process runs a base in shares as often as the first one, which has most batches.
            most = math.ceil(math.ceil(len(data) / world_size()) / batch_size) if is_sharded(module) else 0
            for _ in range(most - math.ceil(len(own_rows) / batch_size)):
                batch = batch_on_device(data.batch([0]), device)
                with autocast(device, precision):
                    module_outputs(module, batch.inputs)
    finally:
        for part, training in modes.items():
            part.training = training
    total, right_ones, counted = sum_over_processes([total, float(correct), float(count)], device)
    if not counted:
        raise InputRefused("there is no labelled example to evaluate on")
    return Score(total / counted, right_ones / counted if has_accuracy else None, int(counted))
