"""PyTorch with the error of products whose inputs onnxruntime rounds to int8."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_export import layers
from lora_export.errors import Undecided
from lora_export.plan import Layout
from lora_export.verification.parity import DECIDES
from lora_export.verification.references.quantised_weights import DequantisedWeight


def round_activations(module: nn.Module, weights: Mapping[str, DequantisedWeight]) -> None:
    """Give layers of the module the error of a product whose input is rounded to int8.

    The rounding is symmetric, with one scale for each block of the input, as onnxruntime does for `accuracy_level` 4.
    An adapter beside a weight takes the input unrounded. The hooks stay on the module. Raises Undecided for a weight
    of nn.MultiheadAttention, whose products no hook sees.
    """
    specs = {spec.name: spec for spec in layers.specs(module)}
    for name, weight in weights.items():
        if weight.activation_block:
            is_transposed = specs[name].layout is Layout.IN_OUT
            matrix = torch.from_numpy(weight.values.T if is_transposed else weight.values)  # (out, in)
            path = name.rpartition(".")[0]
            owners = [module.get_submodule(at) for at in (path, path.rpartition(".")[0])]
            if any(isinstance(owner, nn.MultiheadAttention) for owner in owners):  # it reads its output's weight, too
                raise Undecided(
                    f"{name} is multiplied in int8, and no hook sees the products of nn.MultiheadAttention: how far "
                    f"int8 is from fp64 there is unknown. {DECIDES}: the same graph of an accuracy_level below 4"
                )
            owners[0].register_forward_hook(functools.partial(_add_int8_error, matrix, weight.activation_block))


def _add_int8_error(weight: torch.Tensor, block_size: int, _: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
    (values,) = inputs
    error = _rounded_to_int8(values, block_size) - values
    return output + nn.functional.linear(error, weight.to(error))


def _rounded_to_int8(values: torch.Tensor, block_size: int) -> torch.Tensor:
    features = values.shape[-1]
    blocks = nn.functional.pad(values, (0, -features % block_size)).unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    levels = torch.where(scale > 0, blocks / scale, blocks).round()
    rounded: torch.Tensor = (levels * scale).flatten(-2)[..., :features]
    return rounded
