"""Turn attached adapters into plain weights W + ΔW, rounded as a file stores them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.layers.attaching import detach, scaled_replacement
from lora_export.layers.attachments import ATTACHMENT, adapted_bias, adapted_weight, attached_modules, attachment_of
from lora_export.layers.module_tensors import named_tensors, tensor_name, tensor_registry
from lora_export.layers.torch_internals import own_buffers, own_parameters

# How a tensor is rounded: to a dtype, or by a function, as to the nearest value that a quantised weight can hold.
Rounding = str | Callable[[NDArray[np.float64]], NDArray[np.float64]]
FP32_SUM_ERROR = 2.0**-18  # of W + ΔW in fp32, relative to the size of its terms: 64 products, half an eps each
ROUNDED_AT_ONCE = 1 << 16  # numbers that are rounded at once: what is computed on the way stays in a core's cache


def materialise(
    module: nn.Module,
    rounding: Mapping[str, Rounding],
    preferred: Mapping[str, Tensor],
    *,
    factor: float = 1.0,
    scale_replaced: bool = False,
    in_fp64: bool = False,
) -> None:
    """Turn every branch into a weight, in place: W + ΔW in the module's own precision, rounded once. Then detach.

    `rounding` maps names of tensors to NumPy dtypes or rounding functions. It may name tensors that no adapter
    changes; a tensor that it lacks is not rounded. In a module in fp64, or with `in_fp64`, the result is what a merged
    file should hold, computed without the arithmetic of a merge. With `in_fp64`, one layer at a time is in fp64, and a
    weight that is rounded to a dtype is stored in it. A sum may be so near to the middle of two representable values
    that fp32 could round it to either; then the value of `preferred` is taken, where that is one of the two.
    `factor` and `scale_replaced` are those of `scale_adapters`. Replaced tensors stay in the module.
    Raises InputRefused where nothing is attached.
    """
    paths = {owner: path for path, owner in module.named_modules()}
    for owner in attached_modules(module):
        attachment = attachment_of(owner)
        attachment.factor *= factor
        with _widened_layer(owner) if in_fp64 else contextlib.nullcontext():
            merged = _merged_tensors(owner, factor if scale_replaced else None)
        owner.__dict__[ATTACHMENT] = dataclasses.replace(attachment, replaced=())  # `detach` would remove them
        for attribute, value in merged.items():
            name, registry = tensor_name(paths[owner], attribute), tensor_registry(owner, attribute)
            stored = value.detach()
            if name in rounding:
                how = rounding[name]
                dtype = getattr(torch, how) if in_fp64 and isinstance(how, str) else stored.dtype
                stored = _rounded_sum(stored, registry[attribute], how, preferred.get(name), dtype)
            registry[attribute] = nn.Parameter(stored.detach(), requires_grad=False)
    detach(module)
    _round_tensors(module, rounding)


@contextlib.contextmanager
def _widened_layer(owner: nn.Module) -> Iterator[None]:
    """The tensors of one layer and of its branches in fp64. The layer's own tensors are not touched."""
    registries: list[MutableMapping[str, Any]] = []
    for part in owner.modules():
        registries += [own_parameters(part), own_buffers(part)]
    before = [dict(registry) for registry in registries]
    for registry in registries:
        for name, tensor in registry.items():
            if tensor is not None and tensor.is_floating_point():
                registry[name] = tensor.detach().double()
    try:
        yield
    finally:
        for registry, tensors in zip(registries, before, strict=True):
            registry.update(tensors)


def _merged_tensors(owner: nn.Module, replacement_factor: float | None) -> dict[str, Tensor]:
    """The tensors of a module that adapters change, by attribute, with their changes. None: no scaled replacements."""
    attachment = attachment_of(owner)
    merged: dict[str, Tensor | None] = {}
    for replaced in attachment.replaced:
        current = tensor_registry(owner, replaced.attribute)[replaced.attribute]
        if replacement_factor is not None:
            current = scaled_replacement(replaced, current, replacement_factor)
        merged[replaced.attribute] = current
    merged |= {branch.weight: adapted_weight(owner, branch.weight) for branch in attachment.branches}
    if "lora_shift" in own_buffers(owner):
        merged["bias"] = adapted_bias(owner)
    return {attribute: value for attribute, value in merged.items() if value is not None}


def _rounded_sum(
    value: Tensor, base: Tensor, rounding: Rounding, preferred: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """W + ΔW rounded, as a `dtype`, or the `preferred` values where fp32 could have computed them from W and ΔW.

    W is `base`. A rounding function gets the whole sum.
    """
    if not isinstance(rounding, str):
        # A quantised value is an offset from a zero point: the largest sum has the error of all.
        nearest = _rounded(value, rounding)
        return _with_preferred(value, nearest, preferred, lambda _: (value.abs() + base.abs()).max()).to(dtype)
    exact, rounded = value.reshape(-1), torch.empty(value.numel(), dtype=dtype, device=value.device)
    wanted = None if preferred is None else preferred.reshape(-1)
    base_values = functools.cache(lambda: base.reshape(-1))  # read where a preferred value differs
    for start in range(0, value.numel(), ROUNDED_AT_ONCE):
        block = slice(start, start + ROUNDED_AT_ONCE)
        rounded[block] = _with_preferred(
            exact[block],
            _rounded(exact[block], rounding),
            None if wanted is None else wanted[block],
            lambda at, block=block: exact[block][at].abs() + base_values()[block][at].abs(),  # type: ignore[misc]
        )
    return rounded.view(value.shape)


def _with_preferred(
    exact: Tensor, nearest: Tensor, preferred: Tensor | None, sizes: Callable[[tuple[Tensor, ...]], Tensor]
) -> Tensor:
    """The nearest values, or the preferred ones that are as near as fp32 can tell.

    `sizes` returns the size of the terms of the sums at some indices.
    """
    if preferred is None:
        return nearest
    other = preferred.to(nearest.dtype)
    at = torch.nonzero(other != nearest, as_tuple=True)
    if len(at[0]):
        errors = (other[at] - exact[at]).abs(), (nearest[at] - exact[at]).abs()
        chosen = torch.where(errors[0] <= errors[1] + FP32_SUM_ERROR * sizes(at), other[at], nearest[at])
        return nearest.index_put(at, chosen)  # `nearest` may be the weight itself
    return nearest


def _round_tensors(module: nn.Module, rounding: Mapping[str, Rounding]) -> None:
    """Round the tensors that `rounding` names. A tied tensor stays one tensor."""
    rounded: dict[int, Tensor] = {}  # by the id of the tensor that it replaces
    for entry in named_tensors(module):
        if entry.name in rounding:
            value = _rounded(entry.tensor.detach(), rounding[entry.name])
            if not torch.equal(value, entry.tensor):  # a sum that is rounded already stays as it is
                is_parameter = isinstance(entry.tensor, nn.Parameter)
                rounded[id(entry.tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    for entry in list(named_tensors(module)):
        if id(entry.tensor) in rounded:
            tensor_registry(entry.owner, entry.attribute)[entry.attribute] = rounded[id(entry.tensor)]


def _rounded(value: Tensor, rounding: Rounding) -> Tensor:
    if isinstance(rounding, str):
        return value.to(getattr(torch, rounding)).to(value.dtype)
    return torch.from_numpy(rounding(value.double().numpy())).to(value.dtype)
