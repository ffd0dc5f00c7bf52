"""The parameters of a module that training changes: how many there are, and the adapter that they make."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import nn

from lora_export.errors import InputRefused, listed
from lora_export.layers.attachments import (
    BRANCH_PARTS,
    TRAINED_ROWS,
    Branch,
    attached_modules,
    attachment_of,
    branch_parameter,
    low_rank_factors,
)
from lora_export.layers.frozen_linear import float_shape
from lora_export.layers.module_tensors import as_array, tensor_registry, wide_dtype
from lora_export.layers.torch_internals import own_modules, own_parameters
from lora_export.lora import Adapter, LoraPair


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
