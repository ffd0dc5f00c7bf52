"""Adapters that act on some tokens only: from the last occurrence of their invocation tokens on (aLoRA).

As in PEFT, whole rows of `input_ids` are searched, padding included. A row without the tokens is that of the base.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers.module_tensors import input_embeddings
from lora_export.layers.torch_internals import pre_hooks

_TEXTS = "input_ids"
# The keyword of forward that takes the cache, in the order of transformers' generations: the second until 5.24.
CACHE_KEYWORDS = "cache", "past_key_values"
# By invocation, of the run of this thread: bools (batch, tokens, 1).
_ACTIVE: ContextVar[Mapping[tuple[int, ...], Tensor]] = ContextVar("_ACTIVE")


def active_tokens(ids: Tensor, invocation: Sequence[int]) -> Tensor:
    """Whether each token of ids (batch, tokens) is in or behind the last `invocation`: (batch, tokens, 1)."""
    places = torch.arange(ids.shape[1], device=ids.device)
    if ids.shape[1] < len(invocation):
        return torch.zeros_like(ids, dtype=torch.bool)[..., None]
    windows = ids.unfold(1, len(invocation), 1)  # (batch, starts, length)
    begins = (windows == torch.tensor(invocation, device=ids.device)).all(-1)
    last = torch.where(begins, places[: begins.shape[1]], -1).amax(1, keepdim=True)
    return ((places >= last) & (last >= 0))[..., None]


def find_active_tokens(module: nn.Module, invocations: Collection[tuple[int, ...]]) -> None:
    """Find the tokens of these invocations in the `input_ids` of every run of a module, from now on.

    Raises InputRefused where the module takes none, or has fewer tokens than these name.
    """
    if _TEXTS not in inspect.signature(module.forward).parameters:
        raise InputRefused(
            f"an activated LoRA (alora_invocation_tokens) finds its tokens in `{_TEXTS}`, which {type(module).__name__}"
            " does not take"
        )
    largest, table = max(itertools.chain(*invocations), default=-1), input_embeddings(module)
    if isinstance(table, nn.Embedding) and largest >= table.num_embeddings:
        raise InputRefused(
            f"alora_invocation_tokens has the token {largest}, and the model has {table.num_embeddings} tokens: the "
            "adapter is not of this model"
        )
    module.register_forward_pre_hook(_Finder(tuple(invocations)), with_kwargs=True)


def forget_active_tokens(module: nn.Module) -> None:
    """Undo `find_active_tokens`."""
    hooks, *flags = pre_hooks(module)
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Finder)]:
        for table in (hooks, *flags):
            table.pop(key, None)


class _Finder:
    """The hook. A copy of the module has a copy of it."""

    def __init__(self, invocations: Sequence[tuple[int, ...]]):
        self.invocations = invocations

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = kwargs | inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given = arguments.get(_TEXTS)
        if given is None:
            raise InputRefused(f"an activated LoRA needs `{_TEXTS}`: it finds its invocation tokens there")
        for name in CACHE_KEYWORDS:
            if (past := arguments.get(name)) is not None and past.get_seq_length():
                raise InputRefused(f"an activated LoRA finds its tokens in whole texts: `{name}` has a part of them")
        _ACTIVE.set({invocation: active_tokens(given, invocation) for invocation in self.invocations})


def active_in(x: Tensor, invocation: tuple[int, ...]) -> Tensor:
    """Of the run of this thread, for the last tokens of x (batch, tokens, features). Raises InputRefused."""
    active = _ACTIVE.get()[invocation]
    if x.ndim != 3 or len(x) != len(active) or x.shape[1] > active.shape[1]:
        raise InputRefused(
            f"an activated LoRA acts on (batch, tokens, features): one of its layers got {tuple(x.shape)}, and "
            f"`{_TEXTS}` are {tuple(active.shape[:2])}"
        )
    return active[:, active.shape[1] - x.shape[1] :]
