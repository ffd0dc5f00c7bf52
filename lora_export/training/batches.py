"""Examples as batches: of arrays, of encoded rows, or as a factory of the user makes them; and losses on them.

A loss is a sum and a count, not a mean. So the parts of a batch, in several steps or on several devices, add up to
what the whole batch gives.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.models.refusals import named_failures
from lora_export.training.records.opening import IGNORED
from lora_export.training.records.rows import Records, Row
from lora_export.user_code import failures_of_user_code


class Batch(NamedTuple):
    """Some examples."""

    inputs: Mapping[str, Any]  # keyword arguments of forward: tensors with one row per example
    labels: Any  # a tensor, unless the loss is the user's


class Loss(Protocol):
    """How far outputs are from labels."""

    rows_per_label: int
    """How many rows of inputs a row of labels is about: row i, and all that are a multiple of len(labels) behind it.
    0 where the loss of some rows is not their share of the loss of all."""

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

    rows_per_label = 1

    def total(self, outputs: Any, batch: Batch) -> Tensor:
        scores, labels = scores_of(outputs), batch.labels
        refuse_other_labels(scores, labels, scores.shape[-1])
        counted = labels != IGNORED
        return F.cross_entropy(scores[counted].float(), labels[counted], reduction="sum")

    def count(self, labels: Any) -> int:
        return int((labels != IGNORED).sum())

    def correct(self, outputs: Any, batch: Batch) -> int | None:
        counted = batch.labels != IGNORED
        return int((scores_of(outputs).argmax(-1) == batch.labels)[counted].sum())


def refuse_other_labels(scores: Tensor, labels: Tensor, classes: int) -> None:
    """Raise InputRefused unless each row of scores, or of what becomes scores, has a label below `classes`."""
    if scores.shape[:-1] != labels.shape:
        several = (
            ". Whole numbers are one class for each row of scores. Several classes of an example are trained from "
            "rows whose label is a list"
        )
        found = f"the model's scores are {(*scores.shape[:-1], classes)}, the labels {tuple(labels.shape)}"
        raise InputRefused(found + (several if scores.shape == labels.shape else ""))
    if labels.numel() and labels.max() >= classes:
        raise InputRefused(f"there is a label {int(labels.max())}, but the model scores {classes} classes")


class _OfValues:
    """All labels count, and none is right or wrong, unless a loss defines them otherwise."""

    rows_per_label = 1

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

    rows_per_label = 2

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

    rows_per_label = 0

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


class Data(Protocol):
    """Examples that can be read in batches."""

    @property
    def loss(self) -> Loss: ...

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int], epoch: int = 0) -> Batch:
        """The examples in these rows. What is random in them depends on row and epoch alone."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Examples that are arrays already."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    @cached_property
    def loss(self) -> Loss:
        return loss_for(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int], epoch: int = 0) -> Batch:  # noqa: ARG002 - nothing is random
        return Batch({name: values[rows] for name, values in self.inputs.items()}, self.labels[rows])


class Encoder(Protocol):
    """How rows become inputs of a model."""

    @property
    def loss(self) -> Loss: ...

    def encode(self, row: Row) -> Any:
        """What one row contributes. Raises InputRefused, without the place, where the row does not fit."""
        ...

    def collate(self, encoded: Sequence[Any]) -> Batch:
        """The batch of encoded rows."""
        ...


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Rows of a file, read and encoded whenever their batch is made."""

    records: Records
    rows: NDArray[np.int64]  # of the records
    encoder: Encoder

    @property
    def loss(self) -> Loss:
        return self.encoder.loss

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, row: int) -> Any:
        """One row, encoded. Raises InputRefused with its place."""
        number = int(self.rows[row])
        with self.records.naming(number):
            return self.encoder.encode(self.records[number])

    def batch(self, rows: Sequence[int], epoch: int = 0) -> Batch:  # noqa: ARG002 - nothing is random
        return self.encoder.collate([self.encoded(row) for row in rows])


@dataclass(frozen=True, eq=False)
class ReadyBatches:
    """Batches that a factory of the user made: each is one example of this data."""

    batches: Sequence[Batch]
    loss: Loss

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, rows: Sequence[int], epoch: int = 0) -> Batch:  # noqa: ARG002 - nothing is random
        (row,) = rows
        return self.batches[row]


def batch_on_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on a device."""
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    return Batch(inputs, batch.labels.to(device) if isinstance(batch.labels, Tensor) else batch.labels)


def refuse_unknown_inputs(module: nn.Module, data: Data) -> None:
    """Raise InputRefused unless the data has the inputs that the module's forward needs, and no others."""
    inputs, _ = data.batch([0])
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {parameter.name for parameter in parameters}
    needed = {
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
    }
    if set(inputs) - known or needed - set(inputs):
        raise InputRefused(
            f"the examples contain {', '.join(inputs)}; the model's forward takes {', '.join(sorted(known))}"
        )


def read_own_batches(source: str, factory: Callable[[], Any]) -> ReadyBatches:
    """Call a factory that returns (batches, loss).

    `batches` are pairs of the inputs of forward, by name, and whatever the loss compares the outputs with. They are
    kept in memory. `loss(outputs, labels)` returns a tensor with one number. Raises InputRefused for anything else.
    """
    with failures_of_user_code(source):
        result = factory()
        made, loss = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
        if not isinstance(made, Iterable) or not callable(loss):
            raise InputRefused(f"{source} must return (batches, loss): pairs of inputs and labels, and a function")
        batches = list(made)
    if not batches:
        raise InputRefused(f"{source} made no batches")
    for number, batch in enumerate(batches, 1):
        inputs = batch[0] if isinstance(batch, tuple) and len(batch) == 2 else None
        if not isinstance(inputs, Mapping) or not inputs or not all(isinstance(name, str) for name in inputs):
            raise InputRefused(f"{source}: batch {number} is no pair of inputs, by the names of forward, and labels")
    return ReadyBatches([Batch(*batch) for batch in batches], OwnLoss(loss))


def batches_sha256(data: ReadyBatches) -> str:
    """The hash of all inputs and labels that are tensors, with their types and shapes."""
    digest = hashlib.sha256()
    for batch in data.batches:
        for name, value in [*batch.inputs.items(), ("labels", batch.labels)]:
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(f" {value.dtype} {tuple(value.shape)} ".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
