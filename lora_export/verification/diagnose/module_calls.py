"""The input and output of each call of a PyTorch model's layers, recorded by hooks; as the matrices of y = x Wᵀ + b."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_export import layers
from lora_export.graph.insert.adapter_names import module_of
from lora_export.layers import MatrixWeight
from lora_export.plan import Layout
from lora_export.verification.parity import Array, Wide


class ModuleCall(NamedTuple):
    """One call of the module that has a weight."""

    weight: str
    number: int  # among the module's calls in a run, from 0

    def __str__(self) -> str:
        return module_of(self.weight) + (f" (call {self.number + 1})" if self.number else "")


class CallValues(NamedTuple):
    """The input of a call, where it is known, and its output."""

    x: Array | None
    y: Array


OnCall = Callable[[ModuleCall, Tensor | None, Tensor], None]
OnWeight = Callable[[str, Tensor | None, Tensor], None]


def matrix_weights(module: nn.Module) -> dict[str, MatrixWeight]:
    return {weight.name: weight for weight in layers.find_matrix_weights(module)}


@contextlib.contextmanager
def observing_calls(module: nn.Module, names: Collection[str], on_call: OnCall) -> Iterator[None]:
    """Call `on_call` with the input and output of every call of these weights' modules, while active."""
    numbers: dict[str, int] = {}

    def on_weight(weight: str, x: Tensor | None, y: Tensor) -> None:
        numbers[weight] = numbers.get(weight, -1) + 1
        on_call(ModuleCall(weight, numbers[weight]), x, y)

    attention = _AttentionMode(on_weight)
    handles = []
    for weight in layers.find_matrix_weights(module):
        if weight.name not in names:
            continue
        if weight.attention is None:

            def hook(_: nn.Module, inputs: tuple[Any, ...], y: Tensor, name: str = weight.name) -> None:
                on_weight(name, inputs[0] if inputs else None, y)

            handles.append(weight.owner.register_forward_hook(hook))
        else:
            attention.weights.setdefault(weight.attention, []).append(weight)
    for owner in attention.weights:
        handles.append(owner.register_forward_pre_hook(lambda owner, _: attention.active.append(owner)))
        handles.append(owner.register_forward_hook(lambda *_: attention.active.pop() and None))
    try:
        with attention:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _AttentionMode(TorchFunctionMode):
    """Observes the products of nn.MultiheadAttention, whose projections are no modules that are called.

    An active mode also keeps PyTorch from its fast paths, in which no hook is called.
    """

    def __init__(self, on_weight: OnWeight):
        super().__init__()
        self.on_weight = on_weight
        self.active: list[nn.Module] = []  # the attention modules that are running
        self.weights: dict[nn.Module, list[MatrixWeight]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.multi_head_attention_forward and self.active:
            arguments = inspect.signature(func).bind(*args, **kwargs).arguments
            for weight in self.weights[self.active[-1]]:
                self._observe(weight, arguments, result[0])
        return result

    def _observe(self, weight: MatrixWeight, arguments: dict[str, Any], y: Tensor) -> None:
        query = arguments["query"]
        if weight.attribute == "in_proj_weight":
            if arguments["key"] is query and arguments["value"] is query:
                projected = F.linear(query, arguments["in_proj_weight"], arguments.get("in_proj_bias"))
                self.on_weight(weight.name, query, projected)
            return
        # With an identity as its weight, the output projection returns its own input.
        identity = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
        x, _ = F.multi_head_attention_forward(**arguments | {"out_proj_weight": identity, "out_proj_bias": None})
        self.on_weight(weight.name, x, y)


def to_wide_numpy(tensor: Tensor) -> Array:
    """The tensor as an array; bfloat16 becomes float32."""
    array: Array = tensor.detach().cpu().to(torch.float32 if tensor.dtype is torch.bfloat16 else tensor.dtype).numpy()
    return array


def record_calls(
    module: nn.Module, run: Callable[[], object], calls: Collection[ModuleCall]
) -> dict[ModuleCall, CallValues]:
    """The values of these calls in one run. They are copies: later in-place operations do not change them."""
    recorded: dict[ModuleCall, CallValues] = {}

    def on_call(call: ModuleCall, x: Tensor | None, y: Tensor) -> None:
        if call in wanted:
            recorded[call] = CallValues(None if x is None else to_wide_numpy(x).copy(), to_wide_numpy(y).copy())

    wanted = set(calls)
    with observing_calls(module, {call.weight for call in wanted}, on_call):
        run()
    return recorded


# --- weight, input and output as matrices in fp64 ---


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
