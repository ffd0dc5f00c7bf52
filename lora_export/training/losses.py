"""Losses, and the scores in a model's outputs that they compare with the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.models.failures import named_failures
from lora_export.training.data import IGNORED

Loss = Callable[[Tensor, Tensor], Tensor]  # (the module's scores, labels) -> a scalar


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of scores (n, ..., classes) for int64 labels (n, ...). Ignored labels do not count.

    Raises InputRefused for other shapes, and for a label that is no class.
    """
    if scores.shape[:-1] != labels.shape:
        raise InputRefused(f"the model's scores are {tuple(scores.shape)}, the labels {tuple(labels.shape)}")
    if labels.max() >= scores.shape[-1]:
        raise InputRefused(f"there is a label {int(labels.max())}, but the model scores {scores.shape[-1]} classes")
    total = F.cross_entropy(scores.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)  # 0, not NaN, for a batch of ignored labels alone


def squared_error(scores: Tensor, labels: Tensor) -> Tensor:
    """The mean squared error for float labels. The scores may have a trailing dimension of 1.

    Raises InputRefused for other shapes.
    """
    # Never broadcast: (n, 1) against (n,) would compare every example with every other.
    if scores.shape not in (labels.shape, (*labels.shape, 1)):
        raise InputRefused(f"the model's outputs are {tuple(scores.shape)}, the labels {tuple(labels.shape)}")
    return F.mse_loss(scores.reshape(labels.shape).float(), labels.float())


def loss_for(labels: Tensor) -> Loss:
    """Cross-entropy for integer labels, squared error for float labels."""
    return squared_error if labels.is_floating_point() else cross_entropy


def module_scores(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The scores of a module on these inputs. Raises RuntimeRefused where its own code fails on them."""
    with named_failures(module, inputs, "examples"):
        outputs = module(**inputs)
    return scores_of(outputs)


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
