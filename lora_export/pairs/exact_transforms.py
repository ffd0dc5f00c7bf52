"""T(W) - W in fp64, from the tensors of the file: what a merge is judged by. Shares no code with the merge.

Each kind is its published formula, over a weight (out, inputs), a kernel among the inputs. Beside the change comes its
size, the sum of the absolute values of its products, by which fp32 may have lost digits.

Some outputs change without the others, or some inputs: see `independent_axis`. `own` are those that the weight has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.pairs.transforms import WeightTransform

_Wide = NDArray[np.float64]
_Sized = tuple[_Wide, _Wide]
_Tensors = Mapping[str, _Wide]
_Settings = Mapping[str, Any]
_Indices = NDArray[np.int64]
OF_OUTPUTS, OF_INPUTS = 0, 1


def independent_axis(transform: WeightTransform) -> int | None:
    """Along which axis of the (out, in) view a part changes without the rest: OF_OUTPUTS, OF_INPUTS, or neither."""
    if transform.is_whole:
        return None
    return OF_INPUTS if transform.kind in _BY_INPUTS or transform.settings.get("embedding") else OF_OUTPUTS


def exact_change(transform: WeightTransform, weight: NDArray[Any], own: slice | None = None) -> _Sized:
    """T(W) - W, and its size, of a weight (out, in, ...) or a bias (out,), with the scale of the transform.

    With `own`, `weight` has these of the places along the independent axis. Of a part of a larger weight, what is left
    out along the other axis counts as zero: the part does not depend on it.
    """
    flat, axis = weight.reshape(len(weight), -1).astype(np.float64, copy=False), independent_axis(transform) or 0
    tensors = {name: value.astype(np.float64) for name, value in transform.stored.items()}
    make, parts = EXACT_CHANGES[transform.kind], (transform.rows, transform.columns)
    first = 0 if own is None else own.start
    places = np.arange(first, first + flat.shape[axis])
    along, others = parts[axis], parts[1 - axis]
    places = places if along is None else along[places]
    if others is None:
        change, size = make(tensors, transform.settings, flat, places)
    else:
        here = (slice(None), others) if axis == OF_OUTPUTS else (others, slice(None))
        whole = np.zeros((len(flat), transform.whole[1]) if axis == OF_OUTPUTS else (transform.whole[0], flat.shape[1]))
        whole[here] = flat
        change, size = (each[here] for each in make(tensors, transform.settings, whole, places))
    if transform.scale != 1:
        change, size = transform.scale * change, abs(transform.scale) * size
    return change.reshape(weight.shape), size.reshape(weight.shape)


# --- Scales ---


def _ia3(tensors: _Tensors, settings: _Settings, weight: _Wide, own: _Indices) -> _Sized:
    scales = tensors["ia3_l"].reshape(-1)
    scales = np.repeat(scales, weight.shape[1] // len(scales)) if settings["of_inputs"] else scales[own, None]
    return weight * scales - weight, np.abs(weight) * (np.abs(scales) + 1)


# --- Rotations ---


def skew(values: _Wide, size: int) -> _Wide:
    """The skew-symmetric matrix with these values above its diagonal, row by row."""
    upper: _Wide = np.zeros((size, size))
    place = 0
    for row in range(size):
        upper[row, row + 1 :] = values[place : place + size - row - 1]
        place += size - row - 1
    return upper - upper.T


def neumann(q: _Wide, terms: int) -> _Wide:
    """The Cayley transform as a series of so many terms: I + 2 Q + 2 Q² + ... + Qⁿ (PEFT's OFT v2)."""
    series = np.eye(len(q))
    last = max(terms - 1, 3) if terms > 2 else terms - 1  # PEFT's loop has the cube at least
    for number in range(1, last + 1):
        series += np.linalg.matrix_power(q, number) * (1.0 if number == last and terms > 2 else 2.0)
    return series


def cayley(q: _Wide) -> _Wide:
    """(I - Q)(I + Q)⁻¹, of matrices (..., size, size): both factors commute."""
    one = np.eye(q.shape[-1])
    return np.asarray(np.linalg.solve(one + q, one - q), np.float64)


def _rotated_blocks(weight: _Wide, rotations: Iterator[_Wide]) -> _Sized:
    """Each block of inputs times its rotation: W R."""
    result, size, first = np.empty_like(weight), np.empty_like(weight), 0
    for rotation in rotations:
        own = slice(first, first + len(rotation))
        result[:, own] = weight[:, own] @ rotation
        size[:, own] = np.abs(weight[:, own]) @ _size_of(rotation)
        first = own.stop
    return result - weight, size


def _size_of(rotation: _Wide) -> _Wide:
    """|R - I| + I: a merge adds what a rotation changes to what was there."""
    one = np.eye(rotation.shape[-1])
    size: _Wide = np.abs(rotation - one) + one
    return size


def _oft(tensors: _Tensors, settings: _Settings, weight: _Wide, _own: _Indices) -> _Sized:
    rows, block = tensors["oft_R.weight"], int(settings["block"])
    matrix = weight.T if settings["embedding"] else weight
    count = matrix.shape[1] // block

    def rotations() -> Iterator[_Wide]:
        for number in range(count):
            q = skew(rows[number % len(rows)], block)
            rotation = neumann(q, settings["terms"]) if settings["terms"] else cayley(q)
            yield rotation if settings["embedding"] else rotation.T

    change, size = _rotated_blocks(matrix, rotations())
    return (change.T, size.T) if settings["embedding"] else (change, size)


def _boft(tensors: _Tensors, _settings: _Settings, weight: _Wide, own: _Indices) -> _Sized:
    value, size = weight.copy(), np.abs(weight)
    factors, count, block, _ = tensors["boft_R"].shape
    for factor in range(factors):
        group, half = block * 2**factor, block // 2 if factor else block
        evens_first = sorted(range(group // half), key=lambda each: each % 2)
        source = np.concatenate(
            [np.arange(start + each * half, start + (each + 1) * half)
             for start in range(0, count * block, group) for each in evens_first]
        )  # fmt: skip
        place = np.empty_like(source)
        place[source] = np.arange(len(source))
        data = tensors["boft_R"][factor]
        rotations = cayley((data - np.transpose(data, (0, 2, 1))) / 2)
        inputs = place.reshape(count, block)
        value[:, inputs] = np.einsum("oni,nji->onj", value[:, inputs], rotations)
        size[:, inputs] = np.einsum("oni,nji->onj", size[:, inputs], _size_of(rotations))
    scales = tensors["boft_s"].reshape(-1, 1)[own]
    return value * scales - weight, size * (np.abs(scales - 1) + 1)


def _hra(tensors: _Tensors, settings: _Settings, weight: _Wide, _own: _Indices) -> _Sized:
    value, normals = weight.copy(), list[_Wide]()
    for column in tensors["hra_u"].T:
        own = column / np.linalg.norm(column)
        for normal in normals if settings["orthogonal"] else ():  # Gram and Schmidt
            own = own - (normal @ own) * normal
        own = own / np.linalg.norm(own)
        normals.append(own)
        value -= 2 * np.outer(value @ own, own)
    value -= weight
    largest = 2 * np.sum(np.abs(normals), axis=0)  # a reflection keeps the lengths of outputs
    return value, np.abs(weight) + np.outer(np.linalg.norm(weight, axis=1), largest)


def _road(tensors: _Tensors, settings: _Settings, weight: _Wide, _own: _Indices) -> _Sized:
    half, outputs = settings["group"] // 2, len(weight)
    angles, lengths = tensors["road_theta"], tensors["road_alpha"]
    output = np.arange(outputs)
    group, place = np.divmod(output, 2 * half)
    if settings["variant"] == "road_4":
        at_cosine, at_sine = 4 * half * group + place, 4 * half * group + 2 * half + place
    else:
        at_cosine = at_sine = half * group + place % half if settings["variant"] == "road_1" else output
    sign, other = np.where(place < half, -1, 1), np.where(place < half, output + half, output - half)
    own = (lengths[at_cosine] * np.cos(angles[at_cosine]))[:, None]
    turned = (sign * lengths[at_sine] * np.sin(angles[at_sine]))[:, None]
    size = (np.abs(own - 1) + 1) * np.abs(weight) + np.abs(turned) * np.abs(weight[other])
    return own * weight + turned * weight[other] - weight, size


def _miss_bat(tensors: _Tensors, _settings: _Settings, weight: _Wide, own: _Indices) -> _Sized:
    change, size = np.empty_like(weight), np.empty_like(weight)
    rank = tensors["miss_block"].shape[1]
    for number in np.unique(own // rank):
        rows, matrix = own // rank == number, tensors["miss_block"][number]
        added = matrix[own[rows] % rank]
        for first in range(0, weight.shape[1], rank):
            block = weight[rows, first : first + rank]
            change[rows, first : first + rank] = block @ matrix + added
            size[rows, first : first + rank] = np.abs(block) @ np.abs(matrix) + np.abs(added)
    return change, size


def _deft(tensors: _Tensors, settings: _Settings, weight: _Wide, own: _Indices) -> _Sized:
    p = tensors["deft_P"]
    q, right = (np.linalg.qr(p)[0],) * 2 if settings["method"] == "qr" else (p, p * (p > 0))
    change, size = -q @ (right.T @ weight), np.abs(q) @ (np.abs(right).T @ np.abs(weight))
    if "deft_R" in tensors:
        change += settings["scale"] * q @ tensors["deft_R"][:, own]
        size += abs(settings["scale"]) * np.abs(q) @ np.abs(tensors["deft_R"][:, own])
    return change, size


def _lycoris_rotations(tensors: _Tensors, settings: _Settings, weight: _Wide, _own: _Indices) -> _Sized:
    blocks = tensors["blocks"].reshape(-1, *tensors["blocks"].shape[-3:])  # (factors, blocks, size, size)
    is_butterfly, (factors, count, block, _) = tensors["blocks"].ndim == 4, blocks.shape
    q = blocks - np.transpose(blocks, (0, 1, 3, 2))
    length = np.sqrt(np.sum(q**2)) + 1e-8
    if settings["limit"] > 0 and length > settings["limit"]:
        q = q * settings["limit"] / length
    value, size = weight.copy(), np.abs(weight)
    for factor in range(factors):
        half, p = 2**factor * block // 2, np.arange(count * block)
        # In a butterfly, places 2 k and 2 k + 1 of a group are its outputs k and k + half.
        rows = p - p % (2 * half) + p % (2 * half) // 2 + p % 2 * half if is_butterfly else p
        rotations = cayley(-q[factor] if is_butterfly else q[factor])
        own = rows.reshape(count, block)
        value[own], size[own] = rotations @ value[own], _size_of(rotations) @ size[own]
    scales = tensors["rescale"].reshape(-1, 1) if "rescale" in tensors else np.ones((len(weight), 1))
    return value * scales - weight, size * (np.abs(scales - 1) + 1)


def _lycoris_ia3(tensors: _Tensors, settings: _Settings, weight: _Wide, own: _Indices) -> _Sized:
    w = tensors["weight"]
    change = weight * (np.repeat(w, weight.shape[1] // len(w)) if settings["of_inputs"] else w[own, None])
    return change, np.abs(change)


def _lycoris_glora(tensors: _Tensors, settings: _Settings, weight: _Wide, own: _Indices) -> _Sized:
    a1, a2, b1, b2 = (tensors[name] for name in ("a1", "a2", "b1", "b2"))
    split = weight.reshape(len(weight), len(a1), -1)  # (out, in, kernel)
    change = np.einsum("oik,ir,rj->ojk", split, a1, a2).reshape(weight.shape)
    size = np.einsum("oik,ir,rj->ojk", np.abs(split), np.abs(a1), np.abs(a2)).reshape(weight.shape)
    b1, b2 = b1.reshape(len(b1), -1)[own], b2.reshape(len(b2), -1)
    return settings["scale"] * (change + b1 @ b2), abs(settings["scale"]) * (size + np.abs(b1) @ np.abs(b2))


# --- Entry by entry ---


def _hira(tensors: _Tensors, _settings: _Settings, weight: _Wide, own: _Indices) -> _Sized:
    a, b = tensors["a"].reshape(len(tensors["a"]), -1), tensors["b"].reshape(len(tensors["b"]), -1)[own]
    return weight * (b @ a), np.abs(weight) * (np.abs(b) @ np.abs(a))


def _glora(tensors: _Tensors, settings: _Settings, weight: _Wide, places: _Indices) -> _Sized:
    change, size = np.zeros_like(weight), np.zeros_like(weight)
    for path, times in zip(settings["paths"], (weight, np.ones_like(weight)), strict=True):
        if f"{path}.Xd" in tensors:
            b, a = tensors[f"{path}.Xd"][places], tensors[f"{path}.Xu"]
            change += times * (b @ a)
            size += np.abs(times) * (np.abs(b) @ np.abs(a))
        elif f"{path}.X" in tensors:
            numbers = tensors[f"{path}.X"].reshape(-1, 1)
            own = times * (numbers if len(numbers) == 1 else numbers[places])
            change, size = change + own, size + np.abs(own)
    return change, size


def _supertuning(tensors: _Tensors, settings: _Settings, weight: _Wide, own: _Indices) -> _Sized:
    sparse, b = np.zeros(weight.shape), tensors["b"][own]
    rows, columns = np.divmod(settings["indices"], weight.shape[1])
    place = np.full(1 + max(rows.max(initial=0), own.max()), -1)
    place[own] = np.arange(len(own))
    here = place[rows] >= 0
    sparse[place[rows[here]], columns[here]] = tensors["values"][here]
    change = sparse + settings["scale"] * b @ tensors["a"]
    return change, np.abs(sparse) + abs(settings["scale"]) * np.abs(b) @ np.abs(tensors["a"])


def _peanut(tensors: _Tensors, settings: _Settings, weight: _Wide, _own: _Indices) -> _Sized:
    def layer(name: str, value: _Wide, size: _Wide) -> _Sized:
        """fp32 may lose what each of a layer's products does; no activation makes a difference 1.2 times as large."""
        matrix = tensors[f"peanut_{name}.weight"]
        return _activated(settings["activation"], matrix @ value), 1.2 * np.abs(matrix) @ size

    levels, depth = [layer("A", weight, np.abs(weight))], settings["depth"]
    for number in range(depth):
        levels.append(layer(f"encoders.{number}", *levels[-1]))
    value, size = levels[depth]
    for number in range(depth):
        value, size = layer(f"decoders.{number}", value, size)
        value, size = value + levels[depth - 1 - number][0], size + levels[depth - 1 - number][1]
    b = settings["scale"] * tensors["peanut_B.weight"]
    return b @ value, (2 * depth + 2) * np.abs(b) @ size


def _activated(name: str, x: _Wide) -> _Wide:
    gates: Mapping[str, Callable[[_Wide], Any]] = {
        "relu": lambda x: x > 0,
        "tanh": lambda x: np.sinh(np.clip(x, -20, 20)) / np.cosh(np.clip(x, -20, 20)),
        "sigmoid": lambda x: (1 + np.tanh(x / 2)) / 2,
        "silu": lambda x: (1 + np.tanh(x / 2)) / 2,
        "gelu": lambda x: np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2,
        "linear": np.ones_like,
    }
    return np.asarray(gates[name](x) if name in ("tanh", "sigmoid") else x * gates[name](x), np.float64)


# --- Of all of a weight ---


def _osf(tensors: _Tensors, _settings: _Settings, weight: _Wide, _own: _Indices) -> _Sized:
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    least = slice(len(s) - len(tensors["s"]), None)
    parts = ((tensors["u"] * tensors["s"], tensors["v"]), (-u[:, least] * s[least], v[least]))
    (change, size), (removed, of_removed) = ((a @ b, np.abs(a) @ np.abs(b)) for a, b in parts)
    return change + removed, size + of_removed + np.abs(weight)


def _frod(tensors: _Tensors, settings: _Settings, weight: _Wide, _own: _Indices) -> _Sized:
    v = tensors["v"]
    u = weight @ np.linalg.inv(v).T
    lengths = np.sqrt(np.sum(u**2, axis=0))
    u = np.divide(u, lengths, out=np.zeros_like(u), where=lengths > 1e-12)
    rows, columns = settings["places"]
    changed = u * tensors["lengths"]
    np.add.at(changed.T, columns, (u[:, rows] * tensors["values"]).T)
    value, size = changed @ v.T, np.abs(changed) @ np.abs(v.T)
    return value - weight, size + np.abs(weight)


_BY_INPUTS = {"RoAd", "DEFT", "PEANuT", "LyCORIS OFT", "LyCORIS BOFT"}
EXACT_CHANGES: Mapping[str, Callable[[_Tensors, _Settings, _Wide, _Indices], _Sized]] = {
    "IA3": _ia3,
    "OFT": _oft,
    "BOFT": _boft,
    "HRA": _hra,
    "RoAd": _road,
    "MiSS": _miss_bat,
    "DEFT": _deft,
    "HiRA": _hira,
    "LyCORIS OFT": _lycoris_rotations,
    "LyCORIS BOFT": _lycoris_rotations,
    "LyCORIS IA3": _lycoris_ia3,
    "LyCORIS GLoRA": _lycoris_glora,
    "GLoRA": _glora,
    "SuperTuning": _supertuning,
    "PEANuT": _peanut,
    "OSF": _osf,
    "FRoD": _frod,
}
