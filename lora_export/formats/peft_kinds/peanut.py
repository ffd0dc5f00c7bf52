"""PEFT's kind whose change is the output of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import positive_number
from lora_export.formats.peft_kinds.kind import Stored
from lora_export.pairs.stages import OfMatrix, Stage
from lora_export.pairs.transforms import WeightTransform

_Array = NDArray[Any]
_MOST_LAYERS = 32  # of either half
_HALVES = ("encoders", "decoders")


def _sigmoid(x: _Array) -> _Array:
    return np.asarray(1 / (1 + np.exp(-x)), x.dtype)


def _erf(x: _Array) -> _Array:
    return np.asarray(np.vectorize(math.erf)(x), x.dtype)


PEANUT_FUNCTIONS: Mapping[str, Callable[[_Array], _Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * (1 + _erf(x * x.dtype.type(2**-0.5))) / 2,
    "linear": lambda x: x,
}


def peanut(stored: Stored) -> WeightTransform:
    """PEANuT: a small network makes the change of each input's weights from these, ΔW = s B f(A W) (Zhong 2024).

    f is an activation, then encoders and decoders, each followed by one, with residuals between the two halves.
    """
    config, tensors = stored.config, {name: stored.part(name, 2) for name in stored.parts}
    rank, depth, activation = config["r"], config.get("depth", 0), config.get("act_fn", "relu")
    scale = positive_number("the config", "scaling", config.get("scaling", 1.0))
    if not isinstance(activation, str) or activation not in PEANUT_FUNCTIONS:
        raise InputRefused(f"act_fn is {activation!r}; supported are {', '.join(PEANUT_FUNCTIONS)}")
    a, b = tensors["peanut_A.weight"], tensors["peanut_B.weight"]
    layers = {f"peanut_{half}.{number}.weight" for half in _HALVES for number in range(len(tensors) // 2 - 1)}
    if depth != len(layers) // 2 or tensors.keys() != {"peanut_A.weight", "peanut_B.weight", *layers}:
        raise InputRefused(f"the config's depth is {depth!r}, and it has {', '.join(tensors)}")
    if a.shape != (rank, len(b)) or b.shape[1] != rank or any(tensors[name].shape != (rank, rank) for name in layers):
        shapes = ", ".join(f"{name} {each.shape}" for name, each in tensors.items())
        raise InputRefused(f"{shapes} disagree with each other, or with the rank {rank}")
    settings = {"scale": scale, "activation": activation, "depth": depth}
    return WeightTransform(stored.title, tensors, _lower_peanut, (len(b), 0), settings=settings, rank=rank)


def _lower_peanut(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    tensors, settings = transform.stored, transform.settings
    f, b = PEANUT_FUNCTIONS[settings["activation"]], tensors["peanut_B.weight"] * np.float32(settings["scale"])

    def change(columns: _Array) -> _Array:
        values, residuals = f(tensors["peanut_A.weight"] @ columns), []
        for number in range(settings["depth"]):
            residuals.append(values)
            values = f(tensors[f"peanut_encoders.{number}.weight"] @ values)
        for number in range(settings["depth"]):
            values = f(tensors[f"peanut_decoders.{number}.weight"] @ values) + residuals.pop()
        return np.asarray(b @ values)

    return (OfMatrix(function=change, is_neutral=not b.any()),)
