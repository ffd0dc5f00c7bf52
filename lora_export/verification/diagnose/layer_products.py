"""A layer's weight, input and output as the matrices of y = x Wᵀ + b, in fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lora_export import layers
from lora_export.layers import MatrixWeight
from lora_export.plan import Layout
from lora_export.verification.diagnose.module_calls import CallValues
from lora_export.verification.parity import Array, Wide


def weight_matrix(weight: MatrixWeight) -> Wide:
    """The weight (out, in) without its adapters, a convolution's kernel flattened."""
    tensor = weight.tensor.detach().double().cpu().numpy()
    tensor = tensor.T if weight.layout.is_transposed else tensor
    return tensor.reshape(len(tensor), -1)


def bias_of(weight: MatrixWeight) -> Wide | None:
    """(out,), with the shift of the adapters."""
    bias = weight.bias
    return None if bias is None else bias.detach().double().cpu().numpy()


def product_rows(values: CallValues, weight: MatrixWeight) -> tuple[Array, Wide] | None:
    """x (n, in), or ids (n,), and y (n, out); None where the layer is not such a product."""
    x, y = values
    if x is None:
        return None
    if isinstance(weight.owner, layers.CONVOLUTION_TYPES):
        return convolution_rows(x, y, weight.owner)
    y = y.reshape(-1, y.shape[-1]).astype(np.float64)
    x = x.reshape(-1) if weight.layout is Layout.EMBEDDING else x.reshape(-1, x.shape[-1]).astype(np.float64)
    return (x, y) if len(x) == len(y) else None


def convolution_rows(x: Array, y: Array, layer: Any) -> tuple[Wide, Wide] | None:
    """A convolution as a matrix product: one row for each output position, with the inputs under the kernel.

    None for a grouped convolution, and where the padding is not zeros.
    """
    if layer.groups != 1 or layer.padding_mode != "zeros" or x.ndim != layer.weight.ndim:
        return None
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *_padding_of(layer)])
    reach = [(size - 1) * step + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    dims = len(reach)
    windows = sliding_window_view(padded, reach, axis=tuple(range(2, 2 + dims)))
    steps = tuple(slice(None, None, step) for step in (*layer.stride, *layer.dilation))
    windows = windows[(slice(None), slice(None), *steps)]  # (n, in, positions..., kernel...)
    by_position = np.moveaxis(windows, 1, 1 + dims)  # (n, positions..., in, kernel...)
    rows = by_position.reshape(-1, math.prod(by_position.shape[1 + dims :]))
    outputs = np.moveaxis(y, 1, -1).reshape(-1, y.shape[1]).astype(np.float64)
    return (rows, outputs) if len(rows) == len(outputs) else None


def _padding_of(layer: Any) -> list[tuple[int, int]]:
    """How many zeros a convolution puts before and behind each axis of its input."""
    if layer.padding == "same":  # the output has as many positions as the input
        added = [step * (size - 1) for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [(number // 2, number - number // 2) for number in added]
    sizes = [0] * len(layer.kernel_size) if layer.padding == "valid" else layer.padding
    return [(size, size) for size in sizes]
