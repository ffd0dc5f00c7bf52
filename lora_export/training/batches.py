"""Labelled examples as batches of tensors: keyword arguments of forward, and labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_export.errors import InputRefused
from lora_export.training.data import Examples

Batch = tuple[dict[str, Tensor], Tensor]  # keyword arguments of forward, and labels


class Data(Protocol):
    """Labelled examples that can be read in batches."""

    @property
    def labels(self) -> Tensor: ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """The examples in these rows."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Examples that are arrays already."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def batch(self, rows: Sequence[int]) -> Batch:
        return {name: values[rows] for name, values in self.inputs.items()}, self.labels[rows]


@dataclass(frozen=True, eq=False)
class TokenData:
    """Tokenised texts, padded to the longest of each batch."""

    tokens: Sequence[Mapping[str, Sequence[int]]]
    labels: Tensor
    tokenizer: Any  # transformers' PreTrainedTokenizerBase

    def batch(self, rows: Sequence[int]) -> Batch:
        padded = self.tokenizer.pad([self.tokens[row] for row in rows], return_tensors="pt")
        return dict(padded), self.labels[rows]


def array_data(examples: Examples) -> ArrayData:
    """Examples of arrays, for any module. Raises InputRefused for texts."""
    if examples.texts:
        raise InputRefused("the examples are texts, and the model has no tokenizer: give it arrays (.npz)")
    inputs = {name: torch.from_numpy(values) for name, values in examples.inputs.items()}
    return ArrayData(inputs, torch.from_numpy(examples.labels))


def token_data(examples: Examples, tokenizer: Any, *, max_length: int = 256) -> TokenData:
    """Texts tokenised by a Hugging Face tokenizer and cut at `max_length` tokens, or at the model's own limit.

    Raises InputRefused for arrays, and for a tokenizer without a padding token.
    """
    if not examples.texts:
        raise InputRefused("the examples are arrays, not texts: there is nothing to tokenise")
    if tokenizer.pad_token is None:
        raise InputRefused(
            "the tokenizer has no padding token, so that texts of different lengths make no batch. Give it one, "
            "such as its end of text: tokenizer.pad_token = tokenizer.eos_token; tokenizer.save_pretrained(FOLDER)"
        )
    limit = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(list(examples.texts), truncation=True, max_length=limit)
    tokens = [{name: encoded[name][row] for name in encoded} for row in range(len(examples))]
    return TokenData(tokens, torch.from_numpy(examples.labels), tokenizer)


def batches(data: Data, batch_size: int, shuffled_by: torch.Generator | None = None) -> DataLoader[Batch]:
    """All examples in batches, in their order or shuffled."""
    rows: Any = range(len(data.labels))  # a Dataset of row numbers, of which `batch` makes tensors
    return DataLoader(
        rows, batch_size=batch_size, shuffle=shuffled_by is not None, generator=shuffled_by, collate_fn=data.batch
    )


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
