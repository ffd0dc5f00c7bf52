"""What the modules of a PyTorch model were given and what they made of it, seen by hooks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_export import layers
from lora_export.graph.insert.inserter import module_of
from lora_export.layers import MatrixWeight

Array = NDArray[Any]


class Key(NamedTuple):
    """One call of one module."""

    weight: str
    call: int

    def __str__(self) -> str:
        return module_of(self.weight) + (f" (call {self.call + 1})" if self.call else "")


class Values(NamedTuple):
    """What entered a module, where that could be seen, and what left it."""

    x: Array | None
    y: Array


Seen = Callable[[Key, Tensor | None, Tensor], None]


def places_in(module: nn.Module) -> dict[str, MatrixWeight]:
    return {place.name: place for place in layers.find_matrix_weights(module)}


@contextlib.contextmanager
def watching(module: nn.Module, wanted: Collection[str], seen: Seen) -> Iterator[None]:
    """Have `seen` called with what enters and leaves these weights' modules, while active."""
    calls: dict[str, int] = {}

    def told(weight: str, x: Tensor | None, y: Tensor) -> None:
        calls[weight] = calls.get(weight, -1) + 1
        seen(Key(weight, calls[weight]), x, y)

    attention = _Attention(told)
    handles = []
    for place in layers.find_matrix_weights(module):
        if place.name not in wanted:
            continue
        if place.attention is None:

            def hook(_: nn.Module, given: tuple[Any, ...], y: Tensor, weight: str = place.name) -> None:
                told(weight, given[0] if given else None, y)

            handles.append(place.owner.register_forward_hook(hook))
        else:
            attention.wanted.setdefault(place.attention, {})[place.name] = place
    for owner in attention.wanted:
        handles.append(owner.register_forward_pre_hook(lambda owner, _: attention.inside.append(owner)))
        handles.append(owner.register_forward_hook(lambda *_: attention.inside.pop() and None))
    try:
        with attention:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Attention(TorchFunctionMode):
    """Looks into nn.MultiheadAttention, whose layers are no modules that are called.

    That a mode is active also keeps PyTorch from taking its fast paths, in which no hook is called.
    """

    def __init__(self, told: Callable[[str, Tensor | None, Tensor], None]):
        super().__init__()
        self.told = told
        self.inside: list[nn.Module] = []
        self.wanted: dict[nn.Module, dict[str, MatrixWeight]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.multi_head_attention_forward and self.inside:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            for weight, place in self.wanted[self.inside[-1]].items():
                self._tell(weight, place, given, result[0])
        return result

    def _tell(self, weight: str, place: MatrixWeight, given: dict[str, Any], y: Tensor) -> None:
        query = given["query"]
        if place.attribute == "in_proj_weight":
            if given["key"] is query and given["value"] is query:
                self.told(weight, query, F.linear(query, given["in_proj_weight"], given.get("in_proj_bias")))
            return
        identity = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
        before, _ = F.multi_head_attention_forward(**given | {"out_proj_weight": identity, "out_proj_bias": None})
        self.told(weight, before, y)


def to_numpy(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().to(torch.float32 if tensor.dtype is torch.bfloat16 else tensor.dtype).numpy()
    return array


def recorded(module: nn.Module, run: Callable[[], object], keys: Collection[Key]) -> dict[Key, Values]:
    """What enters and leaves modules in one run. Copies: a later work in place does not change them."""
    found: dict[Key, Values] = {}

    def seen(key: Key, x: Tensor | None, y: Tensor) -> None:
        if key in wanted:
            found[key] = Values(None if x is None else to_numpy(x).copy(), to_numpy(y).copy())

    wanted = set(keys)
    with watching(module, {key.weight for key in wanted}, seen):
        run()
    return found
