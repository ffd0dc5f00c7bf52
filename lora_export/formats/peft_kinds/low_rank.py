"""PEFT's kinds of low rank: one pair, a product of a few factors, or a small network between A and B."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import positive_number
from lora_export.formats.lora_changes import KeyPart, loha, lokr
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.peft_kinds.kind import Config, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.computed import FlatKroneckerPair
from lora_export.pairs.open_shape import MatrixShape, OpenPair
from lora_export.pairs.stages import OfMatrix, RowBlocks, Stage
from lora_export.pairs.structured import KroneckerPair
from lora_export.pairs.transforms import WeightTransform

_PARTS = ("lora_A", "lora_B", "lora_E")


def adalora(stored: Stored) -> LoraPair:
    """AdaLoRA: B diag(E) A, of the ranks that training left to each layer (Zhang et al. 2023).

    PEFT multiplies by alpha / (ranknum + 1e-5). It sets ranknum to the rank with which training began, and never again.
    """
    a, b, e = (stored.parts[part].astype(np.float32) for part in _PARTS)
    kept = (stored.config.get("rank_pattern") or {}).get(f"{stored.module}.lora_E")
    first = stored.config["init_r"]
    rank = first if kept is None else sum(map(bool, kept)) if isinstance(kept, list) else -1
    if a.ndim != 2 or b.ndim != 2 or (len(a), b.shape[1], e.shape) != (rank, rank, (rank, 1)):
        raise InputRefused(f"A {a.shape}, B {b.shape} and E {e.shape} are not of the rank {rank} that the config has")
    scale = adapter_scale(float(np.float32(first) + np.float32(1e-5)), stored.config["lora_alpha"], {})
    if rank == 0:  # training left this layer as it was
        return LoraPair(a=np.zeros((1, a.shape[1]), np.float32), b=np.zeros((len(b), 1), np.float32), scale=scale)
    return LoraPair(a=a * e, b=b, scale=scale)


_PARTS_OF_DELORA = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_SHORTEST = 1e-4  # ‖a‖ and ‖b‖ count as at least that


def delora(stored: Stored) -> LoraPair:
    """DeLoRA in PEFT: a low-rank change of bounded length, by the lengths of the weight's columns (Bini et al. 2025).

    ΔW = λ / r · B diag(1 / (‖a‖ ‖b‖)) A diag(w), with the rows a of A, the columns b of B, and the lengths w, which
    PEFT saves as the training found them. So it is a pair.
    """
    parts, config = stored.parts, stored.config
    a, b, strength, lengths = (np.asarray(parts[name], np.float64) for name in _PARTS_OF_DELORA)
    if a.ndim != 2 or b.ndim != 2 or strength.size != 1 or lengths.shape != a.shape[1:] or len(a) != config["r"]:
        shapes = ", ".join(f"{name} {parts[name].shape}" for name in _PARTS_OF_DELORA)
        raise InputRefused(f"{shapes} and the config's r {config['r']} do not fit each other")
    norms = [np.maximum(np.linalg.norm(each, axis=axis), _SHORTEST) for each, axis in ((a, 1), (b, 0))]
    if norms[0].shape != norms[1].shape:
        raise InputRefused(f"A and B have different ranks: A is {a.shape}, B is {b.shape}")
    a, b = a / norms[0][:, None] * lengths, b / norms[1]
    return LoraPair(a=a.astype(np.float32), b=b.astype(np.float32), scale=float(strength.reshape(-1)[0]) / len(a))


_MOST_RANK = 4  # of all blocks together, as a multiple of the weight's larger side
GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")  # a pair of the whole weight


def gralora(stored: Stored) -> LoraPair:
    """GraLoRA: the weight in k x k blocks, each with a pair of its own of the rank r / k (Jung et al. 2025)."""
    a, b = stored.part("gralora_A", 3), stored.part("gralora_B", 3)
    blocks, rank, hybrid = (stored.config.get(field) for field in ("gralora_k", "r", "hybrid_r"))
    if type(blocks) is not int or type(rank) is not int or blocks < 1 or rank % blocks:
        raise InputRefused(f"r is {rank} and gralora_k {blocks}; r must be a multiple of gralora_k")
    if (a.shape[0], a.shape[2]) != (blocks, rank) or b.shape[:2] != (blocks, rank):
        raise InputRefused(
            f"gralora_A {a.shape} and gralora_B {b.shape} are not of {blocks} blocks and the rank {rank}"
        )
    if blocks * rank > _MOST_RANK * max(blocks * a.shape[1], blocks * b.shape[2]):
        raise InputRefused(
            f"its {blocks} x {blocks} blocks have the rank {blocks * rank} together, more than the weight"
        )
    # Rank (p, n, s) joins the block of outputs p with the block of inputs n.
    own = rank // blocks
    one = np.zeros((blocks, blocks, own, blocks, a.shape[1]), np.float32)
    other = np.zeros((blocks, b.shape[2], blocks, blocks, own), np.float32)
    for n in range(blocks):
        one[:, n, :, n] = a[n].T.reshape(blocks, own, -1)
        other[n, :, n] = b[n].T.reshape(-1, blocks, own)
    factors = [one.reshape(blocks * rank, -1), other.reshape(-1, blocks * rank)]
    if any(name in stored.parts for name in GENERAL) is not bool(hybrid):
        raise InputRefused(
            f"hybrid_r is {hybrid}, and the pair of the whole weight is {'missing' if hybrid else 'there'}"
        )
    if hybrid:
        general = [stored.part(name, 2) for name in GENERAL if name in stored.parts]
        if len(general) != 2 or general[0].shape != (hybrid, factors[0].shape[1]) or general[1].shape[1] != hybrid:
            raise InputRefused(f"the pair of the whole weight does not fit its blocks, or hybrid_r {hybrid}")
        factors = [np.concatenate(parts, axis=axis) for axis, parts in enumerate(zip(factors, general, strict=True))]
    scale = adapter_scale(rank + (hybrid or 0), stored.config["alpha"], {})
    return LoraPair(a=factors[0], b=factors[1], scale=scale)


def miss(stored: Stored) -> LoraPair:
    """MiSS: B alone, and an A that sums every r-th input (Kang and Yin 2024).

    Its mode "bat", that of Bone, multiplies the weight: in square blocks W_ij, W' = W + W_ij B_i + B_i.
    """
    mode, rank, (name,) = stored.config.get("init_weights"), stored.config["r"], stored.parts
    if mode == "bat":
        blocks = stored.part(name, 3)
        if blocks.shape[1:] != (rank, rank):
            raise InputRefused(f"{name} is {blocks.shape}, the config's rank is {rank}")
        return WeightTransform("MiSS", {"miss_block": blocks}, _lower_miss, (len(blocks) * rank, 0), rank=rank)
    block = stored.part(name, 2)
    if len(block) != rank or (mode == "mini" and block.shape[1] != stored.config.get("mini_r")):
        raise InputRefused(f"{name} is {block.shape}, which disagrees with r {rank} or mini_r of the config")

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        out, columns = shape
        repeats, rest = divmod(out, block.shape[1])
        if rest or rank > columns or (repeats > 1 and mode != "mini"):
            raise InputRefused(f"the weight is {shape}, which does not fit {name} {block.shape}")
        a = (np.arange(columns) % rank == np.arange(rank)[:, None]).astype(np.float32)
        return LoraPair(a=a, b=np.tile(block.T, (repeats, 1)), scale=1.0)

    return OpenPair(pair, [block], None if mode == "mini" else block.shape[1])


def _lower_miss(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    blocks = transform.stored["miss_block"]
    if shape[1] % blocks.shape[1] and shape[1] > 1:
        raise InputRefused(f"the weight is {shape}: its inputs are no blocks of {blocks.shape[1]}")
    return (RowBlocks(matrices=blocks),)


def own_scale(config: Config) -> Callable[[int], float]:
    """alpha / r of a module, given the rank of its tensors."""

    def scale(rank: int) -> float:
        if rank != config["r"]:
            raise InputRefused(f"its tensors have the rank {rank}, the config's is {config['r']}")
        return adapter_scale(config["r"], config["alpha"], {})

    return scale


def peft_loha(stored: Stored) -> LoraPair:
    """LoHa in PEFT: (w1_a w1_b) ∘ (w2_a w2_b), entry by entry (Hyeon-Woo et al. 2022)."""
    return loha({KeyPart(part): tensor for part, tensor in stored.parts.items()}, own_scale(stored.config))


def peft_lokr(stored: Stored) -> LoraPair:
    """LoKr in PEFT: the Kronecker product of two factors, each whole or decomposed.

    PEFT multiplies by alpha / r in all cases, LyCORIS only where a factor is decomposed. A whole second factor of an
    nn.Conv1d has an order of its own, see `FlatKroneckerPair`.
    """
    scale = own_scale(stored.config)
    of_wholes = scale(stored.config["r"])
    pair = lokr({KeyPart(part): tensor for part, tensor in stored.parts.items()}, scale, of_wholes=of_wholes)
    if isinstance(pair, KroneckerPair) and KeyPart.LOKR_W2 in stored.parts and pair.w2.ndim == 3:
        return FlatKroneckerPair({"w1": pair.w1, "w2": pair.w2}, pair.scale)
    return pair


_Array = NDArray[Any]
_HALVES = ("encoders", "decoders")


def _sigmoid(x: _Array) -> _Array:
    return np.asarray(1 / (1 + np.exp(-x)), x.dtype)


PEANUT_FUNCTIONS: Mapping[str, Callable[[_Array], _Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x * x.dtype.type(2**-0.5)).astype(x.dtype)) / 2,
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
