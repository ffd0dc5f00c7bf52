"""The loss and accuracy of a module on examples; and the loss of a language model in parts of its rows.

A batch of 8192 tokens and 32,000 words has 1 GB of scores in fp32, and PyTorch makes them three times. In parts, the
scores of all words never exist at once: some rows get their scores, their share of the loss and their share of the
gradient of the hidden states, one part after the other. `torch.nn.functional.linear_cross_entropy` does so since
PyTorch 2.13: it takes the place of `_Total` once that is the oldest release that is supported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_export.errors import InputRefused
from lora_export.layers.products import product
from lora_export.options.train import Precision, TrainingSettings, TrainOptions
from lora_export.training.batches import (
    Batch,
    CrossEntropy,
    Data,
    batch_on_device,
    module_outputs,
    refuse_other_labels,
    refuse_unknown_inputs,
    scores_of,
)
from lora_export.training.compiling import autocast
from lora_export.training.padding import TextParts
from lora_export.training.processes import is_sharded, move, rank, sum_over_processes, world_size
from lora_export.training.records.opening import IGNORED

# Numbers. A product reads all weights of the head for each part: with 2²² (131 rows of 32,000 words) it takes a tenth
# longer than with 2²⁴.
SCORES_AT_ONCE = 1 << 24
LEAST_ROWS_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class HeadLoss:
    """The loss of a model whose scores are what a frozen linear layer makes of hidden states."""

    head: nn.Linear

    @contextlib.contextmanager
    def hidden_states(self) -> Iterator[None]:
        """Let the model return hidden states in place of scores while the context is active."""
        self.head.forward = lambda states: states  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del self.head.forward

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of hidden states (n, ..., width), summed over all labels that count, in fp32. As CrossEntropy."""
        return self.measured(outputs, batch)[0]

    def measured(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same, and, without gradients, how many labels have the highest score."""
        states, labels = scores_of(outputs), batch.labels
        refuse_other_labels(states, labels, self.head.out_features)
        counted = labels != IGNORED
        weight = self.head.weight.to(states.dtype)
        bias = None if self.head.bias is None else self.head.bias.to(states.dtype)
        found: tuple[Tensor, Tensor] = _Total.apply(states[counted], labels[counted], weight, bias)  # type: ignore[no-untyped-call]
        return found


def head_loss(module: nn.Module, data: Data, device: torch.device, precision: Precision) -> HeadLoss | None:
    """The loss in parts, where the module's scores are exactly what its frozen output embeddings return.

    One example shows it, under autocast in this precision: some models scale or cap their scores. Leaves the module in
    eval mode.
    """
    if type(data.loss) is not CrossEntropy or not callable(getattr(module, "get_output_embeddings", None)):
        return None
    head = module.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    made: list[Any] = []
    hook = head.register_forward_hook(lambda _module, _inputs, output: made.append(output))
    module.eval()
    example = batch_on_device(data.batch([0]), device)  # not under autocast, which is for the model alone
    try:
        with torch.no_grad(), autocast(device, precision):
            outputs = module_outputs(module, example.inputs)
    finally:
        hook.remove()
    return HeadLoss(head) if len(made) == 1 and scores_of(outputs) is made[0] else None


class _Total(torch.autograd.Function):
    """Σ (log Σ exp(scores) - score of the label), with the gradient of the hidden states computed beside it.

    Where no gradient is wanted, also how many labels have the highest score.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        size = max(LEAST_ROWS_AT_ONCE, SCORES_AT_ONCE // weight.shape[0])
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        right = torch.zeros((), dtype=torch.int64, device=states.device)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            scores, own = product(states[part], weight, bias).float(), labels[part, None]
            if gradient is None:
                right += (scores.argmax(-1, keepdim=True) == own).sum()
            scores.sub_(scores.amax(-1, keepdim=True))
            of_labels = scores.gather(-1, own)
            sums = scores.exp_().sum(-1, keepdim=True)
            total += (sums.log() - of_labels).sum()
            if gradient is not None:
                chances = scores.div_(sums)
                chances.scatter_add_(-1, own, chances.new_full(own.shape, -1.0))
                gradient[part] = product(chances.to(weight.dtype), weight.T)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient.mul_(scale.to(gradient.dtype)), None, None, None


@dataclass(frozen=True)
class Score:
    """The loss and accuracy of a module on examples, which it need not have been trained on."""

    loss: float
    accuracy: float | None  # correct labels, from 0 to 1; None where values are predicted
    count: int  # labels that were not ignored

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4g} on {self.count:,}"
        return loss if self.accuracy is None else f"accuracy {100 * self.accuracy:.1f} %, {loss}"


def evaluate_as_trained(module: nn.Module, data: Data, settings: TrainingSettings, device: str | torch.device) -> Score:
    """`evaluate` in the precision of a training, and in parts of the size of those that it computes at once."""
    size = math.ceil(settings.batch_size / (settings.accumulate * world_size()))
    return evaluate(module, data, batch_size=size, device=device, precision=settings.precision)


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
    own_rows, shares = range(rank(), len(data), world_size()), is_sharded(module)
    modes = {part: part.training for part in module.modules()}
    move(module, device)
    module.eval()
    parts, head = TextParts(module, data.loss, device), head_loss(module, data, torch.device(device), precision)
    total, correct, count, has_accuracy = 0.0, 0, 0, True
    try:
        with torch.no_grad():
            for start in range(0, len(own_rows), batch_size):
                whole = data.batch(own_rows[start : start + batch_size])
                for batch in [batch_on_device(whole, device)] if shares else parts.of(whole):
                    with autocast(device, precision), head.hidden_states() if head else contextlib.nullcontext():
                        outputs = module_outputs(module, batch.inputs)
                    right: Tensor | int | None
                    if head:
                        value, right = head.measured(outputs, batch)
                    else:
                        value, right = data.loss.total(outputs, batch), data.loss.correct(outputs, batch)
                    total += float(value)
                    count += data.loss.count(batch.labels)
                    has_accuracy = has_accuracy and right is not None
                    correct += int(right or 0)
            # A process runs a base in shares as often as the first one, which has most batches.
            most = math.ceil(math.ceil(len(data) / world_size()) / batch_size) if shares else 0
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
