"""New scales of blocks of ggml, judged by the values V that they were made for.

Of a block whose scales are not the base's, each stored number of the scales is the nearest to its least-squares value
beside all other numbers and the codes, as far as a sum in fp32 determines it. One on which no value depends is the
base's. The block is no further from V than the nearest codes on the scales of the base, and hardly further than on
scales that a search of its own finds (`scale_search`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lora_export.storage.block_copy import Bytes
from lora_export.storage.gguf_blocks import BlockCodec
from lora_export.storage.gguf_scales import BlockNumber, Half
from lora_export.verification.against_checkpoint.fp64_sums import FP32_ROUNDOFF
from lora_export.verification.against_checkpoint.scale_search import least_errors, nearest_numbers
from lora_export.verification.parity import Wide

PRODUCT_ROUNDINGS = 4  # in fp32 of each product in a sum
OF_ERRORS = 1e-4  # how much the squared errors of a block in fp32 may differ from those in fp64

BESIDE_SEARCH = 0.1  # how much the squared error of a block may be above what a search finds

_MOVED, TIES = 4 * FP32_ROUNDOFF, 12  # how far and how often values are moved, so that ties come out in both ways


def beside_codes(codec: BlockCodec) -> NDArray[np.bool_]:
    """Which bytes of a block are no codes."""
    found = np.ones(codec.type.nbytes, bool)
    for plane in codec.planes:
        found[plane.start : plane.start + plane.chunks * plane.width] = False
    return found


def wrong_scales(codec: BlockCodec, base: Bytes, blocks: Bytes, value: Wide, bound: Wide) -> int:
    """How many blocks (blocks, bytes) have wrong scales for V (blocks, elements), which fp32 has within the bound."""
    scales = beside_codes(codec)
    places = np.flatnonzero((base[:, scales] != blocks[:, scales]).any(axis=1))
    base, blocks, value, bound = base[places], blocks[places], value[places], bound[places]
    if not len(places):
        return 0
    with np.errstate(all="ignore"):
        is_right = _no_further(codec, base, blocks, value, bound) & _as_near_as_found(codec, blocks, value, bound)
        for found in _are_best(codec, base, blocks, value, bound):
            is_right &= found.all(axis=1)
    return int(np.count_nonzero(~is_right))


def _no_further(codec: BlockCodec, base: Bytes, blocks: Bytes, value: Wide, bound: Wide) -> NDArray[np.bool_]:
    size = len(blocks), -1, codec.group
    old, new = (
        np.abs(rest.reshape(len(blocks), -1))
        for rest in (_from_nearest(codec, base, value.reshape(size)), codec.decode(blocks).astype(np.float64) - value)
    )
    slack = 2 * ((old + new) * bound).sum(axis=1)
    no_further: NDArray[np.bool_] = np.square(new).sum(axis=1) <= (1 + OF_ERRORS) * np.square(old).sum(axis=1) + slack
    return no_further


def _as_near_as_found(codec: BlockCodec, blocks: Bytes, value: Wide, bound: Wide) -> NDArray[np.bool_]:
    """Whether the error is about that of the search. Of values that are ties between codes, rounding decides on it."""
    reach, random = np.abs(value).max(axis=1, keepdims=True), np.random.default_rng(0)
    rounding = 2 * np.linalg.norm(bound + PRODUCT_ROUNDINGS * FP32_ROUNDOFF * reach, axis=1)
    found = np.linalg.norm(codec.decode(blocks) - value, axis=1)

    def is_near(places: NDArray[np.intp], values: Wide) -> NDArray[np.bool_]:
        least = np.sqrt((1 + BESIDE_SEARCH) * least_errors(codec, values))
        near: NDArray[np.bool_] = (found[places] <= least + rounding[places]) | ~np.isfinite(least)
        return near

    result = is_near(np.arange(len(value)), value)
    for _ in range(TIES):
        if not (places := np.flatnonzero(~result)).size:
            break
        moved = value[places] * (1 + _MOVED * random.uniform(-1, 1, (len(places), value.shape[1])))
        result[places] = is_near(places, moved)
    return result


def _from_nearest(codec: BlockCodec, blocks: Bytes, value: Wide) -> Wide:
    """How far the nearest values on the scales of blocks are."""
    steps, offsets = (np.zeros(1) if each is None else each.astype(np.float64) for each in codec.scales(blocks))
    numbers = nearest_numbers(codec, value, (steps, offsets))
    found: Wide = numbers * steps[..., None] - (value - offsets[..., None])
    return found


def _are_best(codec: BlockCodec, base: Bytes, blocks: Bytes, value: Wide, bound: Wide) -> Iterator[NDArray[np.bool_]]:
    """Of each kind of number whether it is the best, (blocks, 1) or (blocks, groups)."""
    scales, grouped = codec.scales, (len(blocks), -1, codec.group)
    own, old = scales.numbers(blocks), scales.numbers(base)
    x, spread = value.reshape(grouped), bound.reshape(grouped)
    n = codec.numbers[codec.codes_of(blocks)].astype(np.float64).reshape(grouped)
    step, by_step = own.step.astype(np.float64), _factors(own.steps)
    offset = np.zeros_like(step) if own.offset is None else own.offset.astype(np.float64)
    by_offset = _factors(own.offsets)
    a, b = step * by_step, offset * by_offset
    of_step = _Best(x - b[..., None], spread, n, np.abs(x) + np.abs(b)[..., None])
    of_offset = _Best(x - a[..., None] * n, spread, np.ones_like(n), np.abs(x) + np.abs(a[..., None] * n))
    yield of_step.of_blocks(scales.step, by_step, own.step, old.step)
    if own.steps is not None and old.steps is not None:
        yield of_step.of_groups(step, own.steps, old.steps, scales.least, scales.largest)
    if scales.offset is not None and own.offset is not None and old.offset is not None:
        yield of_offset.of_blocks(scales.offset, by_offset, own.offset, old.offset)
    if own.offsets is not None and old.offsets is not None:
        yield of_offset.of_groups(offset, own.offsets, old.offsets, scales.least, scales.largest)


def _factors(of_groups: NDArray[np.float32] | None) -> Wide:
    return np.ones((1, 1)) if of_groups is None else of_groups.astype(np.float64)


class _Best:
    """The number t with the least Σ (rest - t m)², and how far that in fp32 may be."""

    def __init__(self, rest: Wide, bound: Wide, m: Wide, size: Wide) -> None:
        error = bound + PRODUCT_ROUNDINGS * FP32_ROUNDOFF * size
        self.above, self.below = (rest * m).sum(axis=2), np.square(m).sum(axis=2)
        self.error = (error * np.abs(m)).sum(axis=2)

    def of_groups(
        self, unit: Wide, found: NDArray[np.float32], old: NDArray[np.float32], least: int, largest: int
    ) -> NDArray[np.bool_]:
        """Whether whole numbers of groups, times the block's `unit`, are the nearest, or the last on their side."""
        divisor = self.below * unit
        wanted, error = self.above / divisor, self.error / np.abs(divisor)
        is_near = (wanted - found <= 0.5 + error) | (found == largest)
        is_near &= (found - wanted <= 0.5 + error) | (found == least)
        return _or_equal(divisor, found, old, is_near)

    def of_blocks(
        self, number: BlockNumber, factors: Wide, found: NDArray[np.float32], old: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Whether numbers of blocks are the nearest that can be stored; `factors` are those of their groups."""
        above, below, error = (
            (factor * each).sum(axis=1, keepdims=True)
            for factor, each in ((factors, self.above), (np.square(factors), self.below), (np.abs(factors), self.error))
        )
        wanted, error = above / below, error / below
        lower, higher = _neighbours(number, found)
        middle = [(found.astype(np.float64) + each) / 2 for each in (lower, higher)]
        is_near = (middle[0] - error <= wanted) & (wanted <= middle[1] + error)
        return _or_equal(below, found, old, is_near)


def _or_equal(
    divisor: Wide, found: NDArray[np.float32], old: NDArray[np.float32], is_near: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether a number is near, or the base's where no value depends on it."""
    is_right: NDArray[np.bool_] = np.where(divisor == 0, found == old, is_near)
    return is_right


def _neighbours(number: BlockNumber, found: NDArray[np.float32]) -> tuple[Wide, Wide]:
    """The next smaller and the next larger numbers that can be stored."""
    if isinstance(number, Half):
        halves = found.astype(np.float16)
        lower, higher = (np.nextafter(halves, np.float16(end)).astype(np.float64) for end in (-np.inf, np.inf))
        return lower, higher
    wide = found.astype(np.float64)
    return wide / 2, wide * 2
