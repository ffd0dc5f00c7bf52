"""One pair for a layer that computes several outputs at once, such as q, k and v, of the pairs of some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair, is_power_of_two


def fuse_outputs(parts: Mapping[int, LoraPair], sizes: Sequence[int]) -> LoraPair:
    """The pair of a fused layer of these output sizes. Outputs without a pair do not change.

    A is all A below each other, B has each B on its diagonal: the rank is the sum of all, and the product is exactly
    that of the parts. A scale that is another one times a power of two moves into B, where it changes no digit. Raises
    InputRefused where a part has another size than stated, for other scales, and for DoRA on some outputs only.
    """
    starts = np.cumsum([0, *sizes])
    for number, pair in parts.items():
        if pair.shape[0] != sizes[number]:
            raise InputRefused(f"B is {pair.b.shape}, and the base has {sizes[number]} outputs there")
    ordered = [parts[number] for number in sorted(parts)]
    scale = ordered[0].scale
    factors = [pair.scale / scale if pair.scale != scale and scale else 1.0 for pair in ordered]
    same = all(pair.scale == scale or (scale and is_power_of_two(f)) for pair, f in zip(ordered, factors, strict=True))
    if len({pair.shape[1:] for pair in ordered}) != 1 or not same:
        raise InputRefused("the pairs of a fused layer have different scales or inputs")
    with_magnitude = [pair.magnitude for pair in parts.values() if pair.magnitude is not None]
    if with_magnitude and len(with_magnitude) != len(sizes):
        raise InputRefused("DoRA on some outputs of a fused layer is not supported")
    b = np.zeros((int(starts[-1]), sum(pair.rank for pair in parts.values())), np.float32)
    column = 0
    for number, factor in zip(sorted(parts), factors, strict=True):
        pair = parts[number]
        b[starts[number] : starts[number + 1], column : column + pair.rank] = pair.b * np.float32(factor)
        column += pair.rank
    return LoraPair(
        a=np.concatenate([pair.a for pair in ordered]),
        b=b,
        scale=scale,
        magnitude=np.concatenate([p.magnitude for p in ordered if p.magnitude is not None]) if with_magnitude else None,
    )


def joined_outputs(parts: Mapping[int, LoraPair], sizes: Sequence[int]) -> LoraPair:
    """As `fuse_outputs`, with one A of the old rank where every output has a pair with the same A and scale."""
    pairs = [parts[number] for number in sorted(parts)]
    first = pairs[0]
    shares_a = all(pair.scale == first.scale and np.array_equal(pair.a, first.a) for pair in pairs[1:])
    with_magnitude = [pair.magnitude for pair in pairs if pair.magnitude is not None]
    if len(parts) != len(sizes) or not shares_a or len(with_magnitude) not in (0, len(parts)):
        return fuse_outputs(parts, sizes)
    return LoraPair(
        a=first.a,
        b=np.concatenate([pair.b for pair in pairs]),
        scale=first.scale,
        magnitude=np.concatenate(with_magnitude) if with_magnitude else None,
    )


def with_outputs(pair: LoraPair, order: NDArray[np.int64]) -> LoraPair:
    """The pair with its outputs in another order: output k is that of `order[k]` before."""
    magnitude = None if pair.magnitude is None else pair.magnitude[order]
    return LoraPair(a=pair.a, b=pair.b[order], scale=pair.scale, magnitude=magnitude)
