"""The changes that adapters of one file of tensors store: what their keys name, and the pair that tensors make.

Trainers spell the same parts of a change in many ways. The part of a key after the module's name states what the tensor
is, and every format of this kind knows all spellings. The kinds are LoRA, LoCon's Tucker decomposition, LoHa and LoKr
(https://github.com/KohakuBlueleaf/LyCORIS), also with DoRA, and some whose change follows from the weight.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import unwrapped
from lora_export.lora import LoraPair
from lora_export.pairs.stages import Blocks, EntryWise, LowRank, Stage, scales
from lora_export.pairs.structured import HadamardPair, KroneckerPair
from lora_export.pairs.transforms import WeightTransform


class KeyPart(StrEnum):
    """What a tensor is to the change of its module."""

    A = "A"
    B = "B"
    MID = "lora_mid"  # LoCon's core of a Tucker decomposition, between B and A
    ALPHA = "alpha"
    MAGNITUDE = "lora_magnitude_vector"  # DoRA's, as PEFT stores it
    DORA_SCALE = "dora_scale"  # DoRA's, as LyCORIS stores it
    B_BIAS = "bias of B"
    CHANGE = "diff"  # the whole change of a weight
    BIAS_CHANGE = "diff_b"  # the whole change of a bias
    NORM_CHANGE = "w_norm"
    NORM_BIAS_CHANGE = "b_norm"
    LOHA_W1_A = "hada_w1_a"
    LOHA_W1_B = "hada_w1_b"
    LOHA_W2_A = "hada_w2_a"
    LOHA_W2_B = "hada_w2_b"
    LOHA_T1 = "hada_t1"
    LOHA_T2 = "hada_t2"
    LOKR_W1 = "lokr_w1"
    LOKR_W1_A = "lokr_w1_a"
    LOKR_W1_B = "lokr_w1_b"
    LOKR_W2 = "lokr_w2"
    LOKR_W2_A = "lokr_w2_a"
    LOKR_W2_B = "lokr_w2_b"
    LOKR_T2 = "lokr_t2"
    OFT_BLOCKS = "oft_blocks"
    RESCALE = "rescale"  # of the outputs that OFT rotates
    ON_INPUT = "on_input"  # whether IA3 scales inputs
    IA3_WEIGHT = "weight"  # of IA3, beside `on_input` alone
    GLORA_A1 = "a1"
    GLORA_A2 = "a2"
    GLORA_B1 = "b1"
    GLORA_B2 = "b2"


_OWN = r"(hada|lokr)_\w+|diff(_b)?|[wb]_norm|lora_mid|dora_scale|oft_blocks|rescale|on_input"
OWN_NAMES = [part for part in KeyPart if re.fullmatch(_OWN, part)]


@functools.cache
def _endings() -> list[tuple[re.Pattern[str], KeyPart]]:
    """How the key of each part ends. The patterns are compiled for the first key: few adapters have such names."""
    return [
        (
            re.compile(r"\.(lora_down|lora\.down|lora_linear_layer\.down|lora_A(\.default)?)\.weight|\.lora_A"),
            KeyPart.A,
        ),
        (re.compile(r"\.(lora_up|lora\.up|lora_linear_layer\.up|lora_B(\.default)?)\.weight|\.lora_B"), KeyPart.B),
        (re.compile(r"\.lora_(B(\.default)?|up)\.bias"), KeyPart.B_BIAS),
        (re.compile(r"(\.lora|\.lora_linear_layer)?\.alpha"), KeyPart.ALPHA),
        (re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?"), KeyPart.MAGNITUDE),
        *((re.compile(rf"\.{re.escape(part)}(\.weight)?"), part) for part in OWN_NAMES),
        *((re.compile(rf"\.{part}\.weight"), part) for part in KeyPart if part.name.startswith("GLORA")),
    ]


# diffusers' oldest form: the pairs belong to the processor of an attention, not to its layers.
PROCESSOR_ENDING = re.compile(
    r"(\.processor)?\.(?P<layer>to_\w+?)_lora\.(?:(?P<side>down|up)\.weight|(?P<alpha>alpha))"
)
MOST_DOTS = 5  # in an ending; a hostile key may have a million
PARTS_OF_SIDES = {"down": KeyPart.A, "up": KeyPart.B, None: KeyPart.ALPHA}


def split_key(key: str) -> tuple[str, KeyPart] | None:
    """The module and the part that a key names; None for a key of another kind."""
    dots = [match.start() for match in re.finditer(r"\.", key)]
    for start in dots[-MOST_DOTS:]:
        ending = key[start:]
        for pattern, part in _endings():
            if start and pattern.fullmatch(ending):
                return key[:start], part
        if found := PROCESSOR_ENDING.fullmatch(ending):
            layer = "to_out.0" if found["layer"] == "to_out" else found["layer"]
            return f"{key[:start]}.{layer}", PARTS_OF_SIDES[found["side"]]
    return None


class SortedKeys(NamedTuple):
    """The keys of a file by the module that they belong to."""

    modules: Mapping[str, Mapping[KeyPart, str]]  # module -> part -> key
    unknown: list[str]  # keys that name no module or no part
    duplicates: list[str]  # "key and key": two of one part of one module


def sort_keys(keys: Iterable[str], module_of: Callable[[str], str | None]) -> SortedKeys:
    """Sort keys by module. `module_of` is the module for what a key has before its ending; None where it is unknown."""
    modules: dict[str, dict[KeyPart, str]] = {}
    unknown, duplicates, keys = [], [], list(keys)
    found_parts = {unwrapped(key): split_key(unwrapped(key)) for key in keys}
    of_ia3 = {f"{own[0]}.weight": own[0] for own in found_parts.values() if own and own[1] is KeyPart.ON_INPUT}
    for key in keys:
        found = found_parts[unwrapped(key)]
        if found is None and unwrapped(key) in of_ia3:
            found = of_ia3[unwrapped(key)], KeyPart.IA3_WEIGHT
        module = None if found is None else module_of(found[0])
        if found is None or module is None:
            unknown.append(key)
            continue
        parts = modules.setdefault(module, {})
        if found[1] in parts:
            duplicates.append(f"{parts[found[1]]} and {key}")
        parts.setdefault(found[1], key)
    return SortedKeys(modules, unknown, duplicates)


def has_pairs(keys: Iterable[str]) -> bool:
    """Whether one of the keys is a part of a change that an adapter stores. `alpha` alone is none."""
    return any(found is not None and found[1] is not KeyPart.ALPHA for found in map(split_key, keys))


# --- Kinds of changes ---

LOHA_FACTORS = (KeyPart.LOHA_W1_A, KeyPart.LOHA_W1_B, KeyPart.LOHA_W2_A, KeyPart.LOHA_W2_B)
Parts = Mapping[KeyPart, NDArray[Any]]  # of one module


class ChangeKind(NamedTuple):
    """A kind of change: its own parts, those without which it is none, and how they become a pair."""

    own: frozenset[KeyPart]
    needed: tuple[KeyPart, ...]
    make: Callable[[Parts, Callable[[int], float]], LoraPair]


def _lora(tensors: Parts, scale: Callable[[int], float]) -> LoraPair:
    a, b = fp32(tensors[KeyPart.A]), fp32(tensors[KeyPart.B])
    rank = a.shape[0] if a.ndim else 0
    if a.ndim < 2 or b.ndim < 2:
        raise InputRefused(f"A is {a.shape} and B is {b.shape}; both need at least two dimensions")
    if KeyPart.MID in tensors:
        mid = fp32(tensors[KeyPart.MID])
        if mid.ndim < 3 or mid.shape[:2] != (b.shape[1], rank) or a[0].size != a.shape[1] or b[0].size != b.shape[1]:
            raise InputRefused(f"A {a.shape}, the core {mid.shape} and B {b.shape} make no convolution")
        a = np.einsum("pq...,qi->pi...", mid, a.reshape(rank, -1))
    if b.ndim > 2 and a.ndim == 2:
        a = a.reshape(*a.shape, *[1] * (b.ndim - 2))
    if a.ndim > 2 and b.ndim == 2:
        b = b.reshape(*b.shape, *[1] * (a.ndim - 2))
    return LoraPair(a=a, b=b, scale=scale(rank), magnitude=_magnitude(tensors, len(b)))


def loha(tensors: Parts, scale: Callable[[int], float]) -> LoraPair:
    factors: dict[str, NDArray[np.float32]] = {}
    for number in "12":
        up, down, core = (KeyPart(f"hada_{name}") for name in (f"w{number}_a", f"w{number}_b", f"t{number}"))
        a, b = _matrix(tensors[down], down), _matrix(tensors[up], up)
        if core in tensors:
            tucker = fp32(tensors[core])
            if tucker.shape[:2] != (b.shape[0], a.shape[0]) or tucker.ndim < 3:
                raise InputRefused(f"{down} {a.shape}, {core} {tucker.shape} and {up} {b.shape} make no convolution")
            a, b = np.einsum("pq...,qi->pi...", tucker, a), b.T
        factors |= {f"a{number}": a, f"b{number}": b}
    rank = len(tensors[KeyPart.LOHA_W1_B])
    return HadamardPair(factors, scale(rank), _magnitude(tensors, len(factors["b1"])))


def lokr(tensors: Parts, scale: Callable[[int], float], *, of_wholes: float = 1.0) -> LoraPair:
    """The pair of LoKr. `of_wholes` is the scale where no factor is decomposed: LyCORIS does not use alpha there."""
    factors = _kronecker_factor(tensors, KeyPart.LOKR_W1) | _kronecker_factor(tensors, KeyPart.LOKR_W2)
    stored = {part.removeprefix("lokr_"): value for part, value in factors.items()}
    ranks = {tensors[down].shape[0] for down in (KeyPart.LOKR_W1_B, KeyPart.LOKR_W2_B) if down in tensors}
    if len(ranks) > 1:
        raise InputRefused(f"its two factors have the ranks {', '.join(map(str, sorted(ranks)))}")
    pair = KroneckerPair(stored, scale(ranks.pop()) if ranks else of_wholes)
    magnitude = _magnitude(tensors, pair.shape[0])
    return pair if magnitude is None else KroneckerPair(stored, pair.scale, magnitude)


def _kronecker_factor(tensors: Parts, whole: KeyPart) -> dict[KeyPart, NDArray[np.float32]]:
    """The stored parts of one factor. Raises InputRefused where they do not make one."""
    up, down = KeyPart(f"{whole}_a"), KeyPart(f"{whole}_b")
    if whole in tensors:
        if up in tensors or down in tensors:
            raise InputRefused(f"it has {whole} and {up} or {down}")
        return {whole: fp32(tensors[whole])}
    if up not in tensors or down not in tensors:
        raise InputRefused(f"there is neither {whole} nor {up} and {down} for it")
    b, a = _matrix(tensors[up], up), fp32(tensors[down])
    core = KeyPart.LOKR_T2
    if whole is KeyPart.LOKR_W2 and core in tensors:
        tucker = fp32(tensors[core])
        if tucker.ndim < 3 or a.ndim != 2 or tucker.shape[:2] != (b.shape[0], a.shape[0]):
            raise InputRefused(f"{up} {b.shape}, {core} {tucker.shape} and {down} {a.shape} make no convolution")
        return {up: b, down: a, core: tucker}
    if a.ndim < 2 or b.shape[1] != a.shape[0]:
        raise InputRefused(f"{up} {b.shape} and {down} {a.shape} have different ranks")
    return {up: b, down: a}


def _ia3(tensors: Parts, scale: Callable[[int], float]) -> LoraPair:
    del scale  # it has none
    return input_or_output_scales(fp32(tensors[KeyPart.IA3_WEIGHT]), tensors[KeyPart.ON_INPUT])


_OF_GLORA = (KeyPart.GLORA_A1, KeyPart.GLORA_A2, KeyPart.GLORA_B1, KeyPart.GLORA_B2)


def _magnitude(tensors: Parts, out: int) -> NDArray[np.float32] | None:
    """DoRA's magnitude of each output (out,). PEFT stores (out,) or (1, out, 1, ...), LyCORIS (out, 1, ...)."""
    stored = tensors.get(KeyPart.MAGNITUDE, tensors.get(KeyPart.DORA_SCALE))
    if stored is None:
        return None
    axis = 0 if KeyPart.DORA_SCALE in tensors or stored.ndim < 3 else 1
    if stored.size != out or stored.ndim <= axis or stored.shape[axis] != out:
        raise InputRefused(
            f"its DoRA magnitude is {stored.shape}, and the weight has {out} outputs. A magnitude of each input "
            "(LyCORIS with wd_on_output=False) scales columns by their length over all outputs, and a pair here has a "
            "magnitude of each output, as PEFT, diffusers and kohya's scripts have it"
        )
    return fp32(stored).reshape(-1)


def _matrix(tensor: NDArray[Any], part: KeyPart) -> NDArray[np.float32]:
    if tensor.ndim != 2:
        raise InputRefused(f"{part} is {tensor.shape}; a matrix is needed")
    return fp32(tensor)


def fp32(tensor: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(tensor, np.float32)


def is_finite(tensor: NDArray[Any]) -> bool:
    return bool(np.isfinite(tensor.astype(np.float64)).all())


# --- LyCORIS' kinds whose change follows from the weight (https://github.com/KohakuBlueleaf/LyCORIS) ---
#
# Diag-OFT and BOFT rotate blocks of outputs, IA3 scales outputs or inputs, and GLoRA multiplies the weight by a
# product. None of them changes the bias.

_Array = NDArray[Any]


def _rotations(tensors: Parts, _scale: Callable[[int], float]) -> WeightTransform:
    """OFT of blocks (count, size, size), BOFT of (factors, count, size, size). The constraint is stored as alpha.

    R = (I + Q)(I - Q)⁻¹ with Q = blocks - blocksᵀ, which is shortened to the constraint times the outputs.
    """
    blocks, rescale = fp32(tensors[KeyPart.OFT_BLOCKS]), tensors.get(KeyPart.RESCALE)
    constraint = float(tensors[KeyPart.ALPHA].reshape(-1)[0]) if KeyPart.ALPHA in tensors else 0.0
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise InputRefused(f"oft_blocks is {blocks.shape}; square blocks are needed")
    count, size = blocks.shape[-3], blocks.shape[-1]
    outputs, is_butterfly = count * size, blocks.ndim == 4
    if is_butterfly and (size % 2 or any(outputs % (2**number * size) for number in range(len(blocks)))):
        raise InputRefused(f"oft_blocks is {blocks.shape}: so many blocks have no butterfly of {len(blocks)} factors")
    if rescale is not None and rescale.size != outputs:
        raise InputRefused(f"rescale is {rescale.shape}, and the blocks have {outputs} outputs")
    stored = {"blocks": blocks} | ({} if rescale is None else {"rescale": fp32(rescale).reshape(-1)})
    kind, settings = f"LyCORIS {'BOFT' if is_butterfly else 'OFT'}", {"limit": constraint * outputs}
    return WeightTransform(kind, stored, _lower_rotations, (outputs, 0), settings=settings, rank=size)


def _lower_rotations(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    blocks = transform.stored["blocks"].astype(np.float64)
    q = blocks - blocks.swapaxes(-1, -2)
    limit, length = transform.settings["limit"], float(np.linalg.norm(q)) + 1e-8
    q = q * (limit / length) if 0 < limit < length else q
    changes = (2 * q @ np.linalg.inv(np.eye(q.shape[-1]) - q)).astype(np.float32)
    if blocks.ndim == 3:
        stages: list[Stage] = [Blocks(less_identity=changes.swapaxes(1, 2))]
    else:
        orders = [_order(number, *changes.shape[1:3]) for number in range(len(changes))]
        stages = [Blocks(less_identity=each, order=order) for each, order in zip(changes, orders, strict=True)]
    if "rescale" in transform.stored:
        stages.append(scales(transform.stored["rescale"] - np.float32(1), shape))
    return tuple(stages)


def _order(factor: int, count: int, size: int) -> NDArray[np.int64]:
    """The outputs in the order in which they form blocks: those of two halves of a group alternate."""
    order: NDArray[np.int64] = np.arange(count * size).reshape(-1, 2, 2**factor * size // 2).swapaxes(1, 2).reshape(-1)
    return order


def input_or_output_scales(weight: _Array, on_input: _Array) -> WeightTransform:
    """IA3: W + W ∘ w, w of each input or output."""
    axis = 0 if weight.ndim < 2 else 1
    if on_input.size != 1 or weight.ndim < 1 or weight.size != weight.shape[axis] or not weight.size:
        raise InputRefused(f"weight is {weight.shape} and on_input {on_input.shape}; one number for each is needed")
    of_inputs, kernel = bool(on_input.reshape(-1)[0]), (0,) * (weight.ndim - 2)
    whole = (0, weight.size, *kernel) if of_inputs else (weight.size, 0, *kernel)
    settings = {"of_inputs": of_inputs}
    return WeightTransform("LyCORIS IA3", {"weight": weight.reshape(-1)}, _lower_scales, whole, settings=settings)


def _lower_scales(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    return (scales(transform.stored["weight"], shape, of_inputs=transform.settings["of_inputs"]),)


def _glora(tensors: Parts, scale_of: Callable[[int], float]) -> WeightTransform:
    """GLoRA: W + scale (W A1 A2 + B1 B2). A1 (in, rank), A2 (rank, in), B1 (out, rank), B2 (rank, in, ...)."""
    a1, a2, b1, b2 = (fp32(tensors[part]) for part in _OF_GLORA)
    if min(each.ndim for each in (a1, a2, b1, b2)) < 2:
        raise InputRefused("a1, a2, b1 and b2 need at least two dimensions")
    scale = scale_of(a2.shape[0])
    b1 = b1.reshape(*b1.shape[:2], *[1] * (b2.ndim - 2))
    pair = LoraPair(a=b2, b=b1, scale=scale)
    inputs, rank = pair.shape[1], pair.rank
    if (a1.shape[:2], a2.shape[:2]) != ((inputs, rank), (rank, inputs)) or {a1.size, a2.size} != {inputs * rank}:
        raise InputRefused(f"a1 {a1.shape} and a2 {a2.shape} do not fit b1 {b1.shape} and b2 {b2.shape}")
    stored = {"a1": a1.reshape(inputs, rank), "a2": a2.reshape(rank, inputs), "b1": pair.b, "b2": pair.a}
    settings = {"scale": scale}
    return WeightTransform("LyCORIS GLoRA", stored, _lower_product, pair.shape, settings=settings, rank=rank)


def _lower_product(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    stored, scale = transform.stored, transform.settings["scale"]
    kernel = np.eye(math.prod(transform.whole[2:]), dtype=np.float32)  # all places of a kernel are mixed alike
    u, v = np.kron(stored["a2"].T, kernel), np.kron(stored["a1"].T * np.float32(scale), kernel)
    b1, b2 = (stored[name].reshape(len(stored[name]), -1) for name in ("b1", "b2"))
    assert u.shape[0] == shape[1]
    return LowRank(turned=True, u=u, v=v), EntryWise(addend=LoraPair(a=b2, b=b1, scale=scale))


CHANGE_KINDS = (
    ChangeKind(frozenset({KeyPart.A, KeyPart.B, KeyPart.MID}), (KeyPart.A, KeyPart.B), _lora),
    ChangeKind(frozenset(part for part in KeyPart if part.startswith("hada")), LOHA_FACTORS, loha),
    ChangeKind(frozenset(part for part in KeyPart if part.startswith("lokr")), (), lokr),
    ChangeKind(frozenset({KeyPart.OFT_BLOCKS, KeyPart.RESCALE}), (KeyPart.OFT_BLOCKS,), _rotations),
    ChangeKind(frozenset({KeyPart.IA3_WEIGHT}), (KeyPart.IA3_WEIGHT, KeyPart.ON_INPUT), _ia3),
    ChangeKind(frozenset(_OF_GLORA), _OF_GLORA, _glora),
)
