"""What attached adapters become: plain weights W + ΔW, rounded as a file stores them, or an adapter once more."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused, listed
from lora_export.layers.attaching import detach, scaled_replacement
from lora_export.layers.attachments import (
    ATTACHMENT,
    BRANCH_PARTS,
    TRAINED_ROWS,
    Branch,
    adapted_bias,
    adapted_weight,
    attached_modules,
    attachment_of,
    branch_parameter,
    low_rank_factors,
    record_branch,
)
from lora_export.layers.frozen_linear import float_shape
from lora_export.layers.module_tensors import (
    as_array,
    is_in_shares,
    named_tensors,
    tensor_name,
    tensor_registry,
    wide_dtype,
)
from lora_export.layers.torch_internals import own_buffers, own_modules, own_parameters
from lora_export.lora import Adapter, LoraPair

# How a tensor is rounded: to a dtype, or by a function, as to the nearest value that a quantised weight can hold.
Rounding = str | Callable[[NDArray[np.float64]], NDArray[np.float64]]
FP32_SUM_ERROR = 2.0**-18  # of W + ΔW in fp32, relative to the size of its terms: 64 products, half an eps each
# Numbers that are rounded at once: what is computed on the way stays in a core's cache. PyTorch computes so many in one
# thread. With more, its threads meet at each operation, and on a busy machine wait at full load.
ROUNDED_AT_ONCE = 1 << 15


def materialise(
    module: nn.Module,
    rounding: Mapping[str, Rounding],
    preferred: Mapping[str, Tensor],
    *,
    factor: float = 1.0,
    scale_replaced: bool = False,
) -> None:
    """Turn every branch into a weight, in place: W + ΔW in fp64, one layer at a time, rounded once. Then detach.

    `rounding` maps names of tensors to NumPy dtypes or rounding functions. It may name tensors that no adapter
    changes; a tensor that it lacks is not rounded. The result is what a merged file should hold, computed without the
    arithmetic of a merge. A weight that is rounded to a dtype is stored in it. A sum may be so near to the middle of
    two representable values that fp32 could round it to either; then the value of `preferred` is taken, where that is
    one of the two.
    `factor` and `scale_replaced` are those of `scale_adapters`. Replaced tensors stay in the module.
    Raises InputRefused where nothing is attached.
    """
    paths = {owner: path for path, owner in module.named_modules()}
    for owner in attached_modules(module):
        attachment = attachment_of(owner)
        if any(branch.invocation for branch in attachment.branches):
            raise InputRefused("an activated LoRA acts on some tokens only, which no weights of a file do")
        attachment.factor *= factor
        names = {attribute: tensor_name(paths[owner], attribute) for attribute in _changed_attributes(owner)}
        if _is_sum_of_rows(owner, [rounding.get(name) for name in names.values()]):
            for attribute, name in names.items():
                dtype = getattr(torch, str(rounding[name]))
                rounded = _sum_in_rows(owner, attribute, dtype, preferred.get(name))
                own_parameters(owner)[attribute] = nn.Parameter(rounded, requires_grad=False)
            continue
        with _widened_layer(owner):
            merged = _merged_tensors(owner, factor if scale_replaced else None)
        owner.__dict__[ATTACHMENT] = dataclasses.replace(attachment, replaced=())  # `detach` would remove them
        for attribute, value in merged.items():
            name, registry = tensor_name(paths[owner], attribute), tensor_registry(owner, attribute)
            stored = value.detach()
            if name in rounding:
                how = rounding[name]
                dtype = getattr(torch, how) if isinstance(how, str) else stored.dtype
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


def _changed_attributes(owner: nn.Module) -> list[str]:
    """The weights of a layer that branches change."""
    return list(dict.fromkeys(branch.weight for branch in attachment_of(owner).branches))


def _is_sum_of_rows(owner: nn.Module, roundings: Sequence[Rounding | None]) -> bool:
    """Whether all that changes in a layer are matrices W + scale * B A, each rounded to a dtype.

    A row of such a sum needs the same row of W and B, or column of A, alone.
    """
    attachment = attachment_of(owner)
    is_more = attachment.replaced or attachment.rows is not None or "lora_shift" in own_buffers(owner)
    if is_more or not roundings or not all(isinstance(each, str) for each in roundings):
        return False
    if any(branch.dora or branch.transform or branch.region for branch in attachment.branches):
        return False
    weights = [own_parameters(owner)[attribute] for attribute in _changed_attributes(owner)]
    return all(
        weight is not None and weight.ndim == 2 and weight.is_floating_point() and not is_in_shares(weight)
        for weight in weights
    )


def _sum_in_rows(owner: nn.Module, attribute: str, dtype: torch.dtype, preferred: Tensor | None) -> Tensor:
    """W + ΔW in fp64, rounded as `_rounded_sum` does. Of the sum, a few rows are there at once."""
    weight, factor = own_parameters(owner)[attribute], attachment_of(owner).factor
    assert weight is not None
    base, wanted, terms = _read(weight), None if preferred is None else _read(preferred), []
    for branch in attachment_of(owner).branches:
        if branch.weight == attribute:
            record_branch(branch)
            a, b = (part.detach().double() for part in low_rank_factors(owner, branch))
            terms.append(((a.mT, b.mT) if branch.layout.is_transposed else (b, a), factor * branch.scale))
    rounded = torch.empty(base.shape, dtype=dtype, device=base.device)
    count = max(1, ROUNDED_AT_ONCE // max(1, base.shape[1]))
    for start in range(0, len(base), count):
        rows = slice(start, start + count)
        exact = base[rows].to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        for (left, right), scale in terms:
            exact.addmm_(left[rows], right, alpha=scale)
        flat, own = exact.view(-1), base[rows].reshape(-1)
        preferred = None if wanted is None else wanted[rows].reshape(-1)
        nearest = _with_preferred(flat, flat.to(dtype), preferred, functools.partial(_sizes_of_terms, flat, own))
        rounded[rows] = nearest.view(exact.shape)
    return rounded


def _read(tensor: Tensor) -> Tensor:
    """The values of a tensor; of one that is read from a file whenever it is used, those of now."""
    values: Tensor = getattr(tensor, "stored", tensor.detach)()
    return values


def _rounded_sum(
    value: Tensor, base: Tensor, rounding: Rounding, preferred: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """W + ΔW rounded, as a `dtype`, or the `preferred` values where fp32 could have computed them from W and ΔW.

    W is `base`. A rounding function gets the whole sum.
    """
    exact, wanted = value.reshape(-1), None if preferred is None else preferred.reshape(-1)
    if not isinstance(rounding, str):
        # A quantised value is an offset from a zero point: the largest sum has the error of all.
        nearest = _rounded(value, rounding).reshape(-1)
        found = _with_preferred(exact, nearest, wanted, lambda _: (value.abs() + base.abs()).max())
        return found.to(dtype).view(value.shape)
    rounded = torch.empty(value.numel(), dtype=dtype, device=value.device)
    base_values = functools.cache(lambda: _read(base).reshape(-1))  # read where a preferred value differs
    for start in range(0, value.numel(), ROUNDED_AT_ONCE):
        block = slice(start, start + ROUNDED_AT_ONCE)
        rounded[block] = _with_preferred(
            exact[block],
            exact[block].to(getattr(torch, rounding)),
            None if wanted is None else wanted[block],
            lambda at, block=block: _sizes_of_terms(exact[block], base_values()[block], at),  # type: ignore[misc]
        )
    return rounded.view(value.shape)


def _sizes_of_terms(exact: Tensor, base: Tensor, at: Tensor) -> Tensor:
    """The size of W and of the sum W + ΔW at some indices."""
    return exact[at].abs() + base[at].abs()


def _with_preferred(
    exact: Tensor, nearest: Tensor, preferred: Tensor | None, sizes: Callable[[Tensor], Tensor]
) -> Tensor:
    """The nearest values (n,), or the preferred ones that are as near as fp32 can tell.

    `sizes` returns the size of the terms of the sums at some indices.
    """
    if preferred is None:
        return nearest
    at = _where_bits_differ(preferred.to(nearest.dtype), nearest)
    if len(at):
        value, other, near = (each[at].to(exact.dtype) for each in (exact, preferred, nearest))
        is_as_near = (other - value).abs() <= (near - value).abs() + FP32_SUM_ERROR * sizes(at)
        chosen = torch.where(is_as_near, other, near).to(nearest.dtype)
        return nearest.index_put((at,), chosen)  # `nearest` may be the weight itself
    return nearest


def _where_bits_differ(one: Tensor, other: Tensor) -> Tensor:
    """The indices at which two tensors (n,) of one dtype differ. Most blocks have none or few: NumPy is faster then."""
    bits = getattr(torch, f"int{8 * one.element_size()}")
    first, second = (tensor.contiguous().view(bits).cpu().numpy() for tensor in (one, other))
    return torch.from_numpy(np.flatnonzero(first != second)).to(one.device)


def _round_tensors(module: nn.Module, rounding: Mapping[str, Rounding]) -> None:
    """Round the tensors that `rounding` names. A tied tensor stays one tensor."""
    rounded: dict[int, Tensor] = {}  # by the id of the tensor that it replaces
    for entry in named_tensors(module):
        if entry.name in rounding and not _is_stored_as(entry.tensor, rounding[entry.name]):
            value = _rounded(entry.tensor.detach(), rounding[entry.name])
            if not torch.equal(value, entry.tensor):  # a sum that is rounded already stays as it is
                is_parameter = isinstance(entry.tensor, nn.Parameter)
                rounded[id(entry.tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    for entry in list(named_tensors(module)):
        if id(entry.tensor) in rounded:
            tensor_registry(entry.owner, entry.attribute)[entry.attribute] = rounded[id(entry.tensor)]


def _is_stored_as(tensor: Tensor, rounding: Rounding) -> bool:
    """Whether the values have this dtype already. The file of a parameter that is read when needed is not read."""
    own = getattr(tensor, "stored_dtype", tensor.dtype)
    return isinstance(rounding, str) and own is getattr(torch, rounding)


def _rounded(value: Tensor, rounding: Rounding) -> Tensor:
    if isinstance(rounding, str):
        return value.to(getattr(torch, rounding)).to(value.dtype)
    return torch.from_numpy(rounding(value.double().numpy())).to(value.dtype)


# --- The parameters that training changes: how many there are, and the adapter that they make ---


@dataclass(frozen=True)
class ParameterCount:
    """How many of a module's parameters an optimiser would train."""

    trained: int
    total: int

    def __str__(self) -> str:
        percent = 100 * self.trained / self.total if self.total else 0.0
        return f"trainable parameters: {self.trained:,} of {self.total:,} ({percent:.3g} %)"


def count_parameters(module: nn.Module) -> ParameterCount:
    """Count the parameters that require gradients, and all of them. A tied tensor counts once."""
    sizes = [(parameter.requires_grad, math.prod(float_shape(parameter))) for parameter in module.parameters()]
    return ParameterCount(sum(size for trained, size in sizes if trained), sum(size for _, size in sizes))


def refuse_trainable_base(module: nn.Module) -> None:
    """Raise InputRefused where a parameter of the base would be trained beside the attached adapters."""
    allowed: set[int] = set()
    for owner in attached_modules(module):
        parts = [own_modules(owner)[part] for part in BRANCH_PARTS if part in own_modules(owner)]
        allowed.update(id(parameter) for part in parts if part is not None for parameter in part.parameters())
        if (rows := own_parameters(owner).get(TRAINED_ROWS)) is not None:
            allowed.add(id(rows))
        for tensor in attachment_of(owner).replaced:
            allowed.add(id(tensor_registry(owner, tensor.attribute)[tensor.attribute]))
    parameters = module.named_parameters()
    if trained := [name for name, one in parameters if one.requires_grad and id(one) not in allowed]:
        raise InputRefused("the base must be frozen, but these of its parameters would be trained:", listed(trained))


def widen_trained(module: nn.Module) -> None:
    """Convert the parameters that are trained from half precision to fp32, in place. Then the module needs autocast.

    A step of training is often smaller than what half precision can add to a weight. A norm computes in one dtype: it
    is converted as a whole.
    """
    for owner in module.modules():
        own = list(owner.parameters(recurse=False))
        is_norm = all(parameter.ndim == 1 for parameter in own)
        is_trained = any(parameter.requires_grad for parameter in own)
        for parameter in own:
            if parameter.requires_grad or (is_norm and is_trained):
                parameter.data = parameter.data.to(wide_dtype(parameter.dtype))


def read_back(module: nn.Module, like: Adapter) -> Adapter:
    """The adapter `like` with the A, B, magnitudes, rows and replaced tensors that the module now holds.

    The arrays are copies. Raises InputRefused where that adapter is not attached, or a value is not finite.
    """
    pairs, replaced, token_rows = dict(like.pairs), dict(like.replaced), dict(like.token_rows)
    found = False
    for owner in attached_modules(module):
        attachment = attachment_of(owner)
        for branch in attachment.branches:
            if branch.adapter == like.name:
                pairs[branch.module] = _read_pair(owner, branch, like.pairs[branch.module])
                found = True
        for tensor in attachment.replaced:
            if tensor.name and tensor.adapter == like.name:
                replaced[tensor.name] = as_array(tensor_registry(owner, tensor.attribute)[tensor.attribute])
                found = True
        if attachment.rows is not None and attachment.rows.adapter == like.name:
            name, values = attachment.rows.name, own_parameters(owner)[TRAINED_ROWS]
            assert values is not None
            token_rows[name] = dataclasses.replace(token_rows[name], values=as_array(values))
            found = True
    if not found:
        raise InputRefused(f"the adapter {like.name} is not attached to this module")
    return dataclasses.replace(like, pairs=pairs, replaced=replaced, token_rows=token_rows, sha256="", file_sha256="")


def _read_pair(owner: nn.Module, branch: Branch, like: LoraPair) -> LoraPair:
    a, b = map(as_array, low_rank_factors(owner, branch))
    magnitude = as_array(branch_parameter(owner, "lora_magnitude", branch)) if branch.dora else None
    try:
        return dataclasses.replace(like, a=a, b=b, magnitude=magnitude)
    except InputRefused as error:
        raise InputRefused(f"{branch.module}: {error}") from error
