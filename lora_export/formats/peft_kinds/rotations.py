"""PEFT's kinds that rotate or reflect the inputs or the outputs of a weight."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Stored
from lora_export.pairs.stages import Blocks, LowRank, Stage, scales
from lora_export.pairs.transforms import WeightTransform

_MOST_TERMS = 1000  # of the series of a rotation; PEFT's default is 5
_OF_LAYER, _OF_TABLE = "oft_R.weight", "oft_embedding_R.weight"
_Wide = NDArray[np.float64]


def oft(stored: Stored) -> WeightTransform:
    """OFT in PEFT: each block of a layer's inputs is rotated, W' = W Rᵀ (Qiu et al. 2023). Of a table, its columns are.

    A rotation is the Cayley transform of a skew-symmetric matrix, or the first terms of its series. That of a block of
    size 1, which PEFT makes of a layer of prime width, changes nothing.
    """
    config, parts = stored.config, stored.parts
    if len(parts) != 1:
        raise InputRefused("it has rotations of a layer and of a table")
    (part,) = parts
    stands_still = parts[part].ndim == 2 and parts[part].shape[1] == 0 < len(parts[part])  # blocks of size 1
    rows = parts[part].astype(np.float32) if stands_still else stored.part(part, 2)
    embedding = part == _OF_TABLE
    block = (1 + math.isqrt(1 + 8 * rows.shape[-1])) // 2  # rows.shape[1] = block (block - 1) / 2
    if block * (block - 1) != 2 * rows.shape[1]:
        raise InputRefused(f"{part} is {rows.shape}; it has the upper half of a square matrix for each block")
    is_shared = bool(config.get("block_share"))
    if is_shared and len(rows) > 1:
        raise InputRefused(f"{part} has {len(rows)} blocks, and the config sets block_share")
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
    eps = config.get("eps", 6e-5)
    if type(terms) is not int or not 0 <= terms <= _MOST_TERMS or not isinstance(eps, int | float) or not eps > 0:
        raise InputRefused(f"num_cayley_neumann_terms is {terms!r}, and eps {eps!r}")
    inputs = 0 if is_shared else len(rows) * block
    whole = (inputs, 0) if embedding else (0, inputs)
    if config.get("coft"):  # PEFT shortens the rows whenever it uses them
        limit = eps / math.sqrt(len(rows))
        lengths = math.sqrt(2) * np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        rows = np.where(lengths <= limit, rows, rows * (limit / np.maximum(lengths, limit))).astype(np.float32)
    settings = {"block": block, "terms": terms, "embedding": embedding}
    return WeightTransform(
        stored.title, {_OF_LAYER: rows}, _lower_oft, whole, settings=settings, rank=block, embedding=embedding
    )


def _lower_oft(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    if math.prod(transform.whole[2:]) > 1:
        raise InputRefused(
            "PEFT's OFT of a convolution folds overlapping patches of its input, which no weight does, and its own "
            "merge computes something else. Only kernels of size 1 are merged"
        )
    block, embedding = transform.settings["block"], transform.settings["embedding"]
    rows = transform.stored[_OF_LAYER]
    q = np.zeros((len(rows), block, block))
    q[:, *np.triu_indices(block, 1)] = rows
    change = change_of_rotation(q - q.swapaxes(1, 2), transform.settings["terms"])
    change = change.swapaxes(1, 2) if embedding else change
    return (Blocks(turned=not embedding, less_identity=change.astype(np.float32)),)


def change_of_rotation(q: _Wide, terms: int) -> _Wide:
    """R - I of skew-symmetric matrices (blocks, size, size): (I - Q)(I + Q)⁻¹ - I, or 2 Q + 2 Q² + ... of its series.

    PEFT's series has 2 Q from two terms on, and ends with one Qⁿ, n = terms - 1, from the cube on.
    """
    if not terms:
        return -2 * np.linalg.inv(np.eye(q.shape[-1]) + q) @ q
    if terms < 3:
        return 2.0 * (terms - 1) * q
    total, power = 2 * q + 2 * q @ q, q @ q
    for _ in range(3, terms - 1):
        power = power @ q
        total += 2 * power
    return total + power @ q


def boft(stored: Stored) -> WeightTransform:
    """BOFT in PEFT: inputs are rotated in blocks, in several orders, and outputs scaled (Liu et al. 2024).

    W' = s ∘ (W M₀ᵀ M₁ᵀ ...), each M the blocks in an order of a butterfly. The bias is not scaled.
    """
    blocks, scales = stored.part("boft_R", 4), stored.part("boft_s", 2)
    if blocks.shape[2] != blocks.shape[3]:
        raise InputRefused(f"boft_R is {blocks.shape}; (factors, blocks, size, size) is needed")
    factors, count, size, _ = blocks.shape
    if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
        raise InputRefused(f"boft_R is {blocks.shape}: so many blocks have no butterfly of {factors} factors")
    if 1 not in scales.shape:  # (out, 1) of a linear layer, (1, out) of a convolution
        raise InputRefused(f"boft_s is {scales.shape}; it has a scale for each output")
    tensors = {"boft_R": blocks, "boft_s": scales.reshape(-1)}
    return WeightTransform(stored.title, tensors, _lower_boft, (scales.size, count * size), rank=size)


def _lower_boft(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    blocks, of_outputs = transform.stored["boft_R"].astype(np.float64), transform.stored["boft_s"]
    if any(size != transform.whole[2] for size in transform.whole[3:]):
        raise InputRefused("PEFT's BOFT has rotations for square kernels alone")
    half_skew = (blocks - blocks.swapaxes(2, 3)) / 2
    rotations = [
        Blocks(
            turned=True,
            less_identity=change_of_rotation(each, 0).astype(np.float32),
            order=_order(number, *each.shape[:2]),
        )
        for number, each in enumerate(half_skew)
    ]
    return (*rotations, scales(of_outputs - np.float32(1), shape))


def _order(factor: int, count: int, size: int) -> NDArray[np.int64] | None:
    """The inputs in the order in which they form the blocks of a factor: in each group, the even half blocks first."""
    if not factor:
        return None
    halves = np.arange(count * size).reshape(-1, 2**factor, 2, size // 2)  # (group, pair, parity, half a block)
    place = halves.swapaxes(1, 2).reshape(-1)  # where the butterfly puts each input
    return np.argsort(place)


def hra(stored: Stored) -> WeightTransform:
    """HRA in PEFT: the inputs are reflected at some planes one after the other, W' = W H₁ ... H_r (Yuan et al. 2024).

    With `apply_GS`, the normals of the planes are made orthogonal first, so that the order does not count. There are at
    most as many as inputs: PEFT makes others of rounding errors.
    """
    normals, config = stored.part("hra_u", 2), stored.config
    if normals.shape[1] != config["r"]:
        raise InputRefused(f"hra_u is {normals.shape}, and the config's r is {config['r']}")
    if not normals.any(axis=0).all():
        raise InputRefused("a normal of hra_u is zero: it has no plane")
    settings = {"orthogonal": bool(config.get("apply_GS"))}
    if settings["orthogonal"] and normals.shape[1] > len(normals):
        raise InputRefused(
            f"hra_u is {normals.shape}: with apply_GS, r is at most the number of inputs. PEFT makes the other normals "
            "of rounding errors, which differ from one machine to another"
        )
    return WeightTransform(
        stored.title, {"hra_u": normals}, _lower_hra, (0, len(normals)), settings=settings, rank=normals.shape[1]
    )


def _lower_hra(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    """H₁ ... H_r = I - U T Uᵀ with a triangular T (Schreiber and Van Loan 1989, eq. 8)."""
    if any(size != transform.whole[2] for size in transform.whole[3:]):
        raise InputRefused("PEFT's HRA has reflections for square kernels alone")
    u = transform.stored["hra_u"].astype(np.float64)
    if transform.settings["orthogonal"]:
        u = np.linalg.qr(u).Q
    u = u / np.linalg.norm(u, axis=0)
    t = np.zeros((u.shape[1], u.shape[1]))
    for column in range(u.shape[1]):
        t[:column, column] = -2 * t[:column, :column] @ (u[:, :column].T @ u[:, column])
        t[column, column] = 2
    return (LowRank(turned=True, u=(-u @ t.T).astype(np.float32), v=u.T.astype(np.float32)),)


_LARGEST_GROUP = 4096  # outputs; PEFT's default is 64
_PER_OUTPUT = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}


def road(stored: Stored) -> WeightTransform:
    """RoAd in PEFT: pairs of outputs are rotated and scaled, the bias too (Liao et al. 2024).

    In each group of outputs, the first half y and the second half z become α y cos θ - α z sin θ and α z cos θ + α y
    sin θ, each output with an α and a θ: those of road_1 are equal in both halves, and road_4 has others for sine and
    cosine.
    """
    angles, lengths, config = stored.part("road_theta", 1), stored.part("road_alpha", 1), stored.config
    variant, group = config.get("variant", "road_1"), config["group_size"]
    is_known = isinstance(variant, str) and variant in _PER_OUTPUT
    if not is_known or type(group) is not int or group % 2 or group > _LARGEST_GROUP:
        raise InputRefused(f"the variant is {variant!r}, and group_size {group!r}: at most {_LARGEST_GROUP}, and even")
    outputs = int(angles.size / _PER_OUTPUT[variant])
    if angles.shape != lengths.shape or not outputs or outputs % group:
        raise InputRefused(
            f"road_theta {angles.shape} and road_alpha {lengths.shape} make no groups of {group} outputs"
        )
    tensors, settings = {"road_theta": angles, "road_alpha": lengths}, {"variant": variant, "group": group}
    bias = WeightTransform(stored.title, tensors, _lower_road, (outputs,), settings=settings, rank=2)
    return WeightTransform(stored.title, tensors, _lower_road, (outputs, 0), settings=settings, rank=2, bias=bias)


def _lower_road(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    half = transform.settings["group"] // 2
    cosines, sines = _columns(transform)
    matrices = np.zeros((len(cosines), 2 * half, 2 * half))
    first, second = np.arange(half), np.arange(half, 2 * half)
    matrices[:, first, first], matrices[:, second, second] = cosines[:, :half] - 1, cosines[:, half:] - 1
    matrices[:, first, second], matrices[:, second, first] = -sines[:, :half], sines[:, half:]
    return (Blocks(less_identity=matrices.astype(np.float32)),)


def _columns(transform: WeightTransform) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """α cos θ and α sin θ of each output, (groups, group)."""
    group, variant = transform.settings["group"], transform.settings["variant"]
    angles, lengths = (transform.stored[name].astype(np.float64) for name in ("road_theta", "road_alpha"))
    if variant == "road_4":
        angles, lengths = angles.reshape(-1, 2, group), lengths.reshape(-1, 2, group)
        return lengths[:, 0] * np.cos(angles[:, 0]), lengths[:, 1] * np.sin(angles[:, 1])
    if variant == "road_1":
        angles, lengths = (np.tile(each.reshape(-1, group // 2), 2) for each in (angles, lengths))
    angles, lengths = angles.reshape(-1, group), lengths.reshape(-1, group)
    return lengths * np.cos(angles), lengths * np.sin(angles)
