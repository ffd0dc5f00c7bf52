"""Losses: what a model's outputs cost, compared with the labels of a batch.

A loss is a sum and a count, not a mean. So the parts of a batch, in several steps or on several devices, add up to
what the whole batch gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.models.factory import failures_of_user_code
from lora_export.models.tracing import named_failures
from lora_export.training.arrays import IGNORED


class Batch(NamedTuple):
    """Some examples."""

    inputs: Mapping[str, Any]  # keyword arguments of forward: tensors with one row per example
    labels: Any  # a tensor, unless the loss is the user's


class Loss(Protocol):
    """How far outputs are from labels."""

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of a batch, summed over all that counts, in fp32. Raises InputRefused where the shapes differ."""
        ...

    def count(self, labels: Any) -> int:
        """How much of the labels counts: the sum is divided by it."""
        ...

    def correct(self, outputs: Any, batch: Batch) -> int | None:
        """How many predictions are right, of those that count. None where values are predicted."""
        ...


class CrossEntropy:
    """For scores (n, ..., classes) and int64 labels (n, ...). Ignored labels do not count."""

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        scores, labels = scores_of(outputs), batch.labels
        if scores.shape[:-1] != labels.shape:
            raise InputRefused(f"the model's scores are {tuple(scores.shape)}, the labels {tuple(labels.shape)}")
        if labels.numel() and labels.max() >= scores.shape[-1]:
            raise InputRefused(f"there is a label {int(labels.max())}, but the model scores {scores.shape[-1]} classes")
        counted = labels != IGNORED
        return F.cross_entropy(scores[counted].float(), labels[counted], reduction="sum")

    def count(self, labels: Any) -> int:
        return int((labels != IGNORED).sum())

    def correct(self, outputs: Any, batch: Batch) -> int | None:
        counted = batch.labels != IGNORED
        return int((scores_of(outputs).argmax(-1) == batch.labels)[counted].sum())


class _OfValues:
    """All labels count, and none is right or wrong, unless a loss defines them otherwise."""

    def count(self, labels: Any) -> int:
        return int(labels.numel())

    def correct(self, outputs: Any, batch: Batch) -> int | None:  # noqa: ARG002 - the protocol's signature
        return None


class SquaredError(_OfValues):
    """For float labels (n, ...). The scores may have a trailing dimension of 1."""

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        scores, labels = scores_of(outputs), batch.labels
        # Never broadcast: (n, 1) against (n,) would compare every example with every other.
        if scores.shape not in (labels.shape, (*labels.shape, 1)):
            raise InputRefused(f"the model's outputs are {tuple(scores.shape)}, the labels {tuple(labels.shape)}")
        return F.mse_loss(scores.reshape(labels.shape).float(), labels.float(), reduction="sum")


class BinaryCrossEntropy(_OfValues):
    """For scores (n, classes) and labels (n, classes) of 0 and 1: each class is predicted by itself."""

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        scores = scores_of(outputs)
        if scores.shape != batch.labels.shape:
            raise InputRefused(f"the model's scores are {tuple(scores.shape)}, the labels {tuple(batch.labels.shape)}")
        return F.binary_cross_entropy_with_logits(scores.float(), batch.labels, reduction="sum")

    def correct(self, outputs: Any, batch: Batch) -> int | None:
        return int(((scores_of(outputs) > 0) == (batch.labels > 0)).sum())


class CosineError(_OfValues):
    """For pairs of texts: (cosine of their mean vectors - label)². The first half of the rows are the first texts."""

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        states = outputs.get("last_hidden_state") if isinstance(outputs, Mapping) else None
        if states is None:
            raise InputRefused("the model returns no vectors of tokens (last_hidden_state); give a base without a head")
        mask = batch.inputs["attention_mask"][..., None].to(states.dtype)
        first, second = ((states * mask).sum(1) / mask.sum(1)).float().chunk(2)
        return F.mse_loss(F.cosine_similarity(first, second), batch.labels, reduction="sum")


@dataclass(frozen=True)
class LossOfTheModel(_OfValues):
    """For models that get the labels (rows, ...) among their inputs, and return `loss`."""

    is_mean: bool  # over the rows of a batch; otherwise it is their sum

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        value = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise InputRefused("the model returns no `loss` for its `labels`")
        return value.reshape(()).float() * (len(batch.labels) if self.is_mean else 1)

    def count(self, labels: Any) -> int:
        return len(labels)


@dataclass(frozen=True)
class OwnLoss(_OfValues):
    """A function of the user: the model's outputs and the labels of a batch -> the batch's loss, a scalar."""

    function: Callable[[Any, Any], Tensor]

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        with failures_of_user_code("the loss of the data's factory"):
            value = self.function(outputs, batch.labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputRefused(f"the loss of the data's factory is {shape}; it must be a tensor with one number")
        return value.reshape(())

    def count(self, labels: Any) -> int:  # noqa: ARG002 - the protocol's signature
        return 1


def loss_for(labels: Tensor) -> Loss:
    """Cross-entropy for integer labels, squared error for float labels."""
    return SquaredError() if labels.is_floating_point() else CrossEntropy()


def module_outputs(module: nn.Module, inputs: Mapping[str, Any], forward: Callable[..., Any] | None = None) -> Any:
    """The outputs of a module on these inputs, or of its compiled `forward`.

    Raises RuntimeRefused where its own code fails on them.
    """
    with named_failures(module, inputs, "examples"):
        return (forward or module)(**inputs)


def scores_of(outputs: Any) -> Tensor:
    """The scores in a module's outputs: `logits` where it has them, otherwise the first tensor.

    Raises InputRefused where there is no tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        outputs = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()), None)
    elif isinstance(outputs, tuple | list):
        outputs = outputs[0] if outputs else None
    if not isinstance(outputs, Tensor):
        raise InputRefused(f"the model returns {type(outputs).__name__}, where a tensor of scores is needed")
    return outputs
