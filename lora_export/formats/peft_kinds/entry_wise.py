"""PEFT's kinds that change entries, rows or whole parameters: that multiply or add to them, or train a few of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.patterns import Patterns
from lora_export.formats.peft_kinds.kind import ModuleChange, Stored
from lora_export.lora import LoraPair, TokenRows
from lora_export.pairs.computed import SparsePair
from lora_export.pairs.open_shape import MatrixShape, OpenPair
from lora_export.pairs.stages import EntryWise, Stage, scales
from lora_export.pairs.transforms import WeightTransform

_LAYER, _TABLE = ("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")


def hira(stored: Stored) -> WeightTransform:
    """HiRA in PEFT: W' = W + W ∘ (B A), entry by entry, with a low-rank B A and no scale (Huang et al. 2025)."""
    parts = stored.parts
    names = _TABLE if _TABLE[0] in parts else _LAYER
    if set(names) != set(parts):
        raise InputRefused(f"it has {' and '.join(sorted(parts))}; {' and '.join(names)} are needed")
    pair = LoraPair(a=np.asarray(parts[names[0]], np.float32), b=np.asarray(parts[names[1]], np.float32), scale=1.0)
    tensors = {"a": pair.a, "b": pair.b}
    return WeightTransform(stored.title, tensors, _lower_hira, pair.shape, rank=pair.rank, embedding=names is _TABLE)


def _lower_hira(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    a, b = transform.stored["a"], transform.stored["b"]
    return (EntryWise(factor=LoraPair(a=a.reshape(len(a), -1), b=b.reshape(len(b), -1), scale=1.0)),)


def ia3(stored: Stored) -> WeightTransform:
    """IA3 in PEFT: a scale for each output of a layer, or for each input of a feed-forward one (Liu et al. 2022).

    The scales of outputs also multiply the bias.
    """
    scales = np.asarray(stored.parts["ia3_l"], np.float32)
    of_inputs = _is_feedforward(stored.module, stored.config.get("feedforward_modules") or ())
    axis = 0 if scales.ndim == 2 and not of_inputs else 1
    count = scales.shape[axis] if scales.ndim >= 2 else 0
    if not count or count != scales.size:
        place = "input" if of_inputs else "output"
        raise InputRefused(f"ia3_l is {scales.shape}; by feedforward_modules it has a scale for each {place}")
    kernel = (0,) * (scales.ndim - 2)
    whole = (0, count, *kernel) if of_inputs else (count, 0, *kernel)
    tensors, settings = {"ia3_l": scales.reshape(-1)}, {"of_inputs": of_inputs}
    bias = None if of_inputs else WeightTransform(stored.title, tensors, _lower_ia3, (count,), settings=settings)
    return WeightTransform(stored.title, tensors, _lower_ia3, whole, settings=settings, bias=bias)


def _is_feedforward(module: str, patterns: Any) -> bool:
    """As PEFT decides it: a pattern for whole names, or ends of names."""
    if isinstance(patterns, str):
        return bool(Patterns({f"^(?:{patterns})": True}, source="feedforward_modules").values(module))
    if not isinstance(patterns, list | tuple) or not all(isinstance(each, str) for each in patterns):
        raise InputRefused(f"feedforward_modules is {patterns!r}: it is no pattern, and no list of names")
    return module.endswith(tuple(patterns))


def _lower_ia3(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    change = transform.stored["ia3_l"] - np.float32(1)
    return (scales(change, shape, of_inputs=transform.settings["of_inputs"]),)


_PATHS = "ABCDE"


def glora(stored: Stored) -> WeightTransform:
    """GLoRA in PEFT: W' = W + W ∘ A + B, and of the bias b' = b + b ∘ D + E + W C (Chavan et al. 2023).

    A and B are products of pairs, a number for each output, or one number. C, with which a bias would get a part of the
    weight, is refused unless it is zero.
    """
    paths = {path: _path(stored.parts, f"glora_{path}.") for path in _PATHS}
    if paths["C"] and all(each.any() for each in paths["C"].values()):
        raise InputRefused("its C adds a product with the weight to the bias, which is not supported")
    of_weight, of_bias = (
        {f"{path}.{name}": each for path in own for name, each in paths[path].items()} for own in ("AB", "DE")
    )
    sizes = np.array([_size(paths[path]) for path in "AB"]).max(axis=0)
    outputs = max(_size(paths[path])[0] for path in "DE")
    bias = (
        WeightTransform(stored.title, of_bias, _lower_glora, (outputs,), settings={"paths": "DE"}) if of_bias else None
    )
    rank = next((len(each) for name, each in of_weight.items() if name.endswith("Xu")), 1)
    whole = int(sizes[0]), int(sizes[1])
    return WeightTransform(stored.title, of_weight, _lower_glora, whole, settings={"paths": "AB"}, rank=rank, bias=bias)


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


def _lower_glora(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
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


def beft(stored: Stored) -> ModuleChange:
    """BEFT: a trained vector is added to the bias of a layer."""
    return ModuleChange(bias=stored.parts["beft_bias"].reshape(-1))


LAYER = "ln_tuning_layers."


def ln_tuning(stored: Stored) -> ModuleChange:
    """Tuning of normalisation layers: the adapter has these layers as wholes (Zhao et al. 2023)."""
    return ModuleChange(replaced={part.removeprefix(LAYER): tensor for part, tensor in stored.parts.items()})


_DELTA = "trainable_tokens_delta"


def trainable_tokens(stored: Stored) -> ModuleChange:
    """Trained rows of a table of embeddings. They replace the base's rows, which the config records."""
    indices = stored.config.get("token_indices")
    if not isinstance(indices, list) or not all(type(index) is int and abs(index) < 1 << 62 for index in indices):
        raise InputRefused("token_indices of the config is no list of integers")
    return ModuleChange(rows=TokenRows(np.array(indices, np.int64), stored.parts[_DELTA]))


def shira(stored: Stored) -> OpenPair:
    """SHiRA: few entries of the weight are trained (Bhardwaj et al. 2024). Their places are in the file."""
    values, indices = stored.part("shira_weight", 1), stored.parts["shira_indices"]  # floats where Windows saved them
    places = indices.astype(np.int64) if np.isfinite(indices.astype(np.float64)).all() else np.full(indices.shape, -1)
    if places.shape != (2, values.size) or (places != indices).any():
        raise InputRefused(f"shira_indices {indices.shape} {indices.dtype} are not the places of {values.size} entries")

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        return SparsePair({"v": values}, 1.0, settings={"places": places, "shape": shape})

    return OpenPair(pair, [values])


_FACTORS = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


def supertuning(stored: Stored) -> OpenPair:
    """SuperTuning: few entries of the weight are trained, those of the largest values, perhaps beside a LoRA (Supra).

    Their places are in the file unless `save_precomputed_indices` is false: which of equal values were taken is then
    known to PyTorch alone.
    """
    values = stored.part("supertuning_values", 1)
    if "supertuning_indices" not in stored.parts:
        raise InputRefused(
            "it has no supertuning_indices: PEFT chooses the entries by the base's values, and which of equal ones it "
            "takes is not known. Save the adapter with save_precomputed_indices=True"
        )
    indices = stored.parts["supertuning_indices"]
    if not np.issubdtype(indices.dtype, np.integer):
        raise InputRefused(f"supertuning_indices are {indices.dtype}; integers are needed")
    indices = indices.astype(np.int64)
    if indices.shape != values.shape or (indices < 0).any() or len(np.unique(indices)) < len(indices):
        raise InputRefused(f"supertuning_indices {indices.shape} are not the places of {values.size} entries")
    rank, alpha = stored.config.get("r"), stored.config.get("lora_alpha")
    if rank and not (type(rank) is int and isinstance(alpha, int | float) and math.isfinite(alpha)):
        raise InputRefused(f"r is {rank!r}, and lora_alpha {alpha!r}")
    if bool(rank) is not all(name in stored.parts for name in _FACTORS):
        raise InputRefused(f"the config's r is {rank}, and it has {', '.join(stored.parts)}")

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        places = np.stack(np.divmod(indices, shape[1]))
        sparse = SparsePair({"v": values}, 1.0, settings={"places": places, "shape": shape})
        if not rank:
            return sparse
        a, b = (stored.part(name, 2) for name in _FACTORS)
        if (len(a), b.shape[1:]) != (rank, (rank,)):
            raise InputRefused(f"A {a.shape} and B {b.shape} disagree with the config's rank {rank}")
        low_rank = LoraPair(a=a, b=b, scale=float(alpha or 0) / rank)

        def lower(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
            del transform, shape
            return EntryWise(addend=sparse), EntryWise(addend=low_rank)

        tensors = {"values": values, "a": a, "b": b}
        settings = {"indices": indices, "scale": low_rank.scale}
        return WeightTransform(stored.title, tensors, lower, shape, settings=settings, rank=rank)

    return OpenPair(pair, [values])
