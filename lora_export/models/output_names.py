"""The tensors that a module returns, by name: the same names in PyTorch, in a graph and in a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lora_export.errors import RuntimeRefused


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors in a module's outputs, by a mapping's own keys, or as `output_0`, `output_1` … in order.

    The names of nested tensors are joined with a dot. Values that are no tensors are left out. Raises
    RuntimeRefused where no tensor is found.
    """
    named = dict(_named(outputs))
    if not named:
        raise RuntimeRefused(f"the model returned {type(outputs).__name__}, which contains no tensors")
    return named


def have_names(outputs: Mapping[str, Any]) -> bool:
    """Whether a model named its outputs. False where `named_outputs` did, so that only their order has a meaning."""
    return not all(name.startswith("output_") for name in outputs)


def _named(outputs: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(outputs, torch.Tensor):
        yield prefix or "output_0", outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _named(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(outputs, tuple | list):
        for number, value in enumerate(outputs):
            yield from _named(value, f"{prefix}.{number}" if prefix else f"output_{number}")
