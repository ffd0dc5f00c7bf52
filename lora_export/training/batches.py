"""Examples as batches: of arrays, of encoded rows, or as a factory of the user makes them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.models.factory import failures_of_user_code
from lora_export.training.losses import Batch, Loss, OwnLoss, loss_for
from lora_export.training.records.rows import Records, Row


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

    def collate(self, encoded: Sequence[Any], keys: Sequence[tuple[int, int]]) -> Batch:
        """The batch of encoded rows. `keys` (epoch, row) seed what is random in each."""
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
        try:
            return self.encoder.encode(self.records[number])
        except InputRefused as error:
            raise InputRefused(f"{self.records.path}, {self.records.where(number)}: {error}") from error

    def batch(self, rows: Sequence[int], epoch: int = 0) -> Batch:
        keys = [(epoch, int(self.rows[row])) for row in rows]
        return self.encoder.collate([self.encoded(row) for row in rows], keys)


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


def batches_in_order(data: Data, batch_size: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
    """All examples, or these rows, in batches and in their order."""
    rows = range(len(data)) if rows is None else rows
    for start in range(0, len(rows), batch_size):
        yield data.batch(rows[start : start + batch_size])


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
    """The hash of all inputs and labels that are tensors."""
    digest = hashlib.sha256()
    for batch in data.batches:
        for name, value in [*batch.inputs.items(), ("labels", batch.labels)]:
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
