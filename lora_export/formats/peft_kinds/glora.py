"""GLoRA in PEFT: W' = W + W ∘ A + B, and of the bias b' = b + b ∘ D + E + W C (Chavan et al. 2023).

A and B are products of pairs, a number for each output, or one number. C, with which a bias would get a part of the
weight, is refused unless it is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.stages import EntryWise, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "GLoRA"
_PATHS = "ABCDE"


def _change(stored: Stored) -> WeightTransform:
    paths = {path: _path(stored.parts, f"glora_{path}.") for path in _PATHS}
    if paths["C"] and all(each.any() for each in paths["C"].values()):
        raise InputRefused("its C adds a product with the weight to the bias, which is not supported")
    of_weight, of_bias = (
        {f"{path}.{name}": each for path in own for name, each in paths[path].items()} for own in ("AB", "DE")
    )
    sizes = np.array([_size(paths[path]) for path in "AB"]).max(axis=0)
    outputs = max(_size(paths[path])[0] for path in "DE")
    bias = WeightTransform(_TITLE, of_bias, _lower, (outputs,), settings={"paths": "DE"}) if of_bias else None
    rank = next((len(each) for name, each in of_weight.items() if name.endswith("Xu")), 1)
    whole = int(sizes[0]), int(sizes[1])
    return WeightTransform(_TITLE, of_weight, _lower, whole, settings={"paths": "AB"}, rank=rank, bias=bias)


def _path(parts: Mapping[str, NDArray[Any]], start: str) -> dict[str, NDArray[np.float32]]:
    """The tensors of one of the five: Xd and Xu, or X. Without any, PEFT saves zeros."""
    own = {
        name.removeprefix(start): np.asarray(value, np.float32)
        for name, value in parts.items()
        if name.startswith(start)
    }
    zeros = own.pop("zeros", np.zeros(0))
    is_known = set(own) in (set(), {"X"}, {"Xd", "Xu"})
    if not is_known or zeros.any() or any(not 1 <= each.ndim <= 2 or not each.size for each in own.values()):
        shapes = ", ".join(f"{name} {each.shape}" for name, each in own.items())
        raise InputRefused(f"{start[:-1]} has {shapes}: it is X, or Xd and Xu")
    return own


def _size(path: Mapping[str, NDArray[Any]]) -> tuple[int, int]:
    """Outputs and inputs of the weight, 0 for what the tensors do not show."""
    if "Xd" in path:
        return len(path["Xd"]), path["Xu"].shape[-1]
    return (path["X"].size if "X" in path and path["X"].size > 1 else 0), 0


def _lower(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    factor, addend = (_pair(transform, path, shape) for path in transform.settings["paths"])
    return (EntryWise(factor=factor, addend=addend),)


def _pair(transform: WeightTransform, path: str, shape: tuple[int, int]) -> LoraPair | None:
    own = {name[2:]: value for name, value in transform.stored.items() if name.startswith(path)}
    if not own:
        return None
    if "Xd" in own:
        return LoraPair(a=own["Xu"], b=own["Xd"], scale=1.0)
    values = np.broadcast_to(own["X"].reshape(-1, 1), (shape[0], 1))
    return LoraPair(a=np.ones((1, shape[1]), np.float32), b=values, scale=1.0)


KIND = Kind(
    peft_type="GLORA",
    title=_TITLE,
    change=_change,
    parts=tuple(f"glora_{path}.{name}" for path in _PATHS for name in ("X", "Xd", "Xu", "zeros")),
    fields=("config_A_B", "config_C", "config_D_E", "init_weights"),
    numbers=("r",),
)
