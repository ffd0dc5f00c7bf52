"""The tensors that an nn.Module holds: their names, also as transformers renames them, their owners and layouts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers.frozen_linear import float_shape, is_4bit
from lora_export.layers.torch_internals import own_buffers, own_parameters, unsaved_buffers
from lora_export.lora import Adapter
from lora_export.names.architecture import ArchitectureRules, rules_of
from lora_export.names.loaded_names import LoadedNames
from lora_export.options.spelling import named
from lora_export.plan import Layout, TensorSpec
from lora_export.plan.layouts import check_stated, stated_layout
from lora_export.plan.match_names import with_prefixes
from lora_export.plan.spelling import respelled

CONVOLUTION_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class ModuleTensor(NamedTuple):
    """A tensor under one of its names. A tied tensor has several names."""

    name: str
    owner: nn.Module
    attribute: str
    tensor: Tensor


def named_tensors(module: nn.Module) -> Iterator[ModuleTensor]:
    """Every parameter and persistent buffer, in the order of the state_dict."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for attribute, tensor in (*own_parameters(owner).items(), *own_buffers(owner).items()):
            if tensor is not None and attribute not in unsaved_buffers(owner):
                yield ModuleTensor(tensor_name(path, attribute), owner, attribute, tensor)


def input_embeddings(module: nn.Module) -> nn.Module | None:
    """The table of tokens that a model of transformers states; None for other modules, and where it has none."""
    model: Any = module
    try:
        table: nn.Module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no model of transformers; Canine's
        return None
    return table


def tensor_name(path: str, attribute: str) -> str:
    """The state_dict's name of an attribute of the module at `path`. The root module has an empty path."""
    return f"{path}.{attribute}" if path else attribute


def dtype_name(dtype: torch.dtype) -> str:
    """The name as NumPy has it, such as `float16`."""
    return str(dtype).removeprefix("torch.")


def specs(module: nn.Module) -> list[TensorSpec]:
    """Name, shape, dtype and layout of every tensor in the module's state_dict. A tied tensor has one spec per name.

    A weight in 4 bits is the matrix of fp32 that its layer computes with.
    Raises InputRefused for a lazy module that has not been run: its tensors have no shapes.
    """
    found = []
    for name, owner, attribute, tensor in named_tensors(module):
        if nn.parameter.is_lazy(tensor):
            raise InputRefused(f"{name} has no shape yet: run the lazy module on example inputs first")
        found.append(
            TensorSpec(
                name=name,
                shape=float_shape(tensor),
                dtype="float32" if is_4bit(tensor) else dtype_name(tensor.dtype),
                layout=layout_of(owner, attribute),
                nbytes=tensor.nbytes,
            )
        )
    return found


def layout_of(owner: nn.Module, attribute: str) -> Layout:
    """The layout of one tensor, from the type of the module that holds it."""
    if isinstance(owner, (nn.Linear, *CONVOLUTION_TYPES)) and attribute == "weight":
        return Layout.OUT_IN
    if isinstance(owner, nn.Embedding) and attribute == "weight":
        return Layout.EMBEDDING
    if isinstance(owner, nn.MultiheadAttention) and attribute in ATTENTION_WEIGHTS:
        return Layout.OUT_IN
    if isinstance(owner, conv1d()) and attribute == "weight":
        return Layout.IN_OUT
    if attribute == "weight" and isinstance(declared := getattr(owner, "lora_layout", None), Layout):
        return declared  # stated, or the weight of a .pt2 program, whose layer is known by its name alone
    own = own_parameters(owner).get("weight")
    if attribute == "weight" and own is not None and own.ndim == 2 and not _has_forward_of_torch(owner):
        return Layout.UNKNOWN  # a matrix that a forward of its own reads, such as that of a router of experts
    return Layout.OTHER


def state_layouts(module: nn.Module, stated: Mapping[str, str]) -> bool:
    """State the layouts of matrices, in place, where the classes of their layers do not (see `plan.make`).

    Returns whether there were any. Raises WrongUsage and InputRefused as `plan.make` does, and for a layer, named
    alone, whose class contradicts it.
    """
    check_stated(stated, {spec.name: spec for spec in specs(module)})
    has_effect = False
    for name, owner, attribute, _ in named_tensors(module):
        own, wanted = layout_of(owner, attribute), stated_layout(name, stated)
        if own is Layout.UNKNOWN and wanted is not None:
            owner.lora_layout, has_effect = wanted, True  # type: ignore[assignment]
        elif stated.keys() & {name, name.removesuffix(".weight")} and own is not wanted:
            raise InputRefused(f"{named('layout')} states that {name} is {wanted}, but the model's is {own}")
    return has_effect


def _has_forward_of_torch(owner: nn.Module) -> bool:
    """Whether a module is one of torch.nn, such as a norm, or of a class derived from one."""
    kinds = (kind for kind in type(owner).__mro__ if kind is not nn.Module)
    return any(kind.__module__.startswith(nn.modules.__name__) for kind in kinds)


def conv1d() -> tuple[type[nn.Module], ...]:
    """The Conv1D class of transformers, or nothing while transformers is not loaded: no module can hold one then."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return (loaded.Conv1D,) if loaded else ()


def tensor_registry(owner: nn.Module, attribute: str) -> dict[str, Any]:
    """The dictionary of `owner` that holds this tensor: its parameters or its buffers."""
    return own_parameters(owner) if attribute in own_parameters(owner) else own_buffers(owner)


def oriented(weight: Tensor, layout: Layout) -> Tensor:
    """Convert a weight from its stored layout to (out, in, ...), or back: the two conversions are the same."""
    return weight.T if layout.is_transposed else weight


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which changes to a weight are computed: fp64 for fp64 weights, otherwise fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


# --- Between NumPy and torch: bf16 has no common name ---


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor with the values of an array. Always a copy."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.uint16)).view(torch.bfloat16)
    return torch.tensor(array)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """An array with the values of a tensor. Always a copy."""
    own = tensor.detach().cpu().clone()
    if own.dtype is torch.bfloat16:
        bits: NDArray[Any] = own.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return bits
    array: NDArray[Any] = own.numpy()
    return array


# --- Weights of which each of several processes holds a share (FSDP): PyTorch's DTensor ---


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, where it is in no shares."""
    loaded = sys.modules.get("torch.distributed.tensor")  # by `fully_shard`
    return tensor.to_local() if loaded and isinstance(tensor, loaded.DTensor) else tensor


def is_in_shares(tensor: Tensor) -> bool:
    """Whether this process holds a share of the tensor alone."""
    return own_share(tensor) is not tensor


def respelled_for(module: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters under the names of a module. Raises as `plan.spelling.respelled`.

    Where a module is the inner part of a model (`outer_names`), names of the whole model fit it, too. Pairs on a layer
    that it had and does not read (`unread`) are left out, with a note.
    """
    adapters = [_without_unread(module, _without_outer_names(module, adapter)) for adapter in adapters]
    rules = _conversion_rules(module) if adapters else None
    return adapters if rules is None else respelled(adapters, specs(module), rules)


def _without_outer_names(module: nn.Module, adapter: Adapter) -> Adapter:
    outer: tuple[str, ...] = getattr(module, "outer_names", ())
    used = {prefix: "" for prefix in outer if any(name.startswith(prefix) for name in adapter.every_name)}
    return with_prefixes([adapter], used)[0]


def _without_unread(module: nn.Module, adapter: Adapter) -> Adapter:
    unread: tuple[str, ...] = getattr(module, "unread", ())
    dropped = [name for name in adapter.every_name if name.startswith(unread)] if unread else []
    if not dropped:
        return adapter
    note = f"{adapter.name} changes {', '.join(dropped)}, which no output of the model reads: left out"
    kept = adapter.renamed(lambda name: None if name.startswith(unread) else name)
    return replace(kept, notes=(*adapter.notes, note))


def with_loaded_names(module: nn.Module, dtypes: Mapping[str, str]) -> dict[str, str]:
    """Dtypes of stored tensors, also under the names that these have in the module.

    A tensor that was made of several stored ones has a dtype if all of these have it.
    """
    rules = _conversion_rules(module)
    if rules is None:
        return dict(dtypes)
    found = dict(dtypes)
    for tensor in LoadedNames(rules, dtypes).values():
        kinds = {dtypes[name] for name in tensor.sources}
        if len(kinds) == 1:
            found[tensor.name] = kinds.pop()
    return found


def _conversion_rules(module: nn.Module) -> ArchitectureRules | None:
    """How transformers renames the weights of one of its models while it loads them; None for other modules."""
    config = getattr(module, "config", None)
    if config is None or not type(module).__module__.startswith("transformers."):
        return None
    return rules_of({**config.to_dict(), "architectures": [type(module).__name__]})
