"""New scales for blocks of ggml: those on which the nearest codes have the least squared error.

The numbers of the scales and the codes are fitted to each other in turn, from the best of a few starts. Each becomes
the best one beside all others: a number of the scales is the nearest to its least-squares value. A block is ready where
none of them changes any more. It is taken where it is nearer to the values than the nearest codes on the scales that
are there. So no block is further away for its new scales, and a proof can tell whether scales are right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.storage.block_copy import Bytes
from lora_export.storage.gguf_blocks import BlockCodec
from lora_export.storage.gguf_scales import BlockNumber, Floats, ScaleNumbers, StepsAndOffsets

Doubles = NDArray[np.float64]
MOST_ROUNDS = 64  # a block that is not ready then keeps its scales
RANGE_PARTS = (1.0, 0.92, 0.84, 0.76)  # of the range of the values, that the codes cover at a start
POWERS = (1.0, 2.0, 0.5, 4.0)  # instead of these, where steps are powers of two
CLEARLY_LARGER, CLEARLY_BETTER = 1 + 1e-6, 0.999  # the first of two as good ones is taken, whatever rounds
_EXACT = 1e-9  # of the squared values: errors below are rounding


def on_best_scales(codec: BlockCodec, blocks: Bytes, values: Floats) -> Bytes:
    """Blocks nearest to finite values (blocks, elements): on scales of their own, or on those that the blocks have."""
    best = codec.encode(blocks, values)
    errors = _squared_errors(codec, best, values)
    places = np.flatnonzero(errors > 0)
    if not places.size:
        return best
    old, wanted = blocks[places], values[places]
    with np.errstate(all="ignore"):  # values beyond every scale: their errors are no numbers
        found, are_ready = _settled(codec, old, wanted, _best_start(codec, old, wanted))
    is_better = are_ready & (_squared_errors(codec, found, wanted) < errors[places])  # NaN is not
    best[places[is_better]] = found[is_better]
    return best


def _squared_errors(codec: BlockCodec, blocks: Bytes, values: NDArray[np.floating]) -> Doubles:
    """The sum of squared distances of each block from its values, (blocks,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: Doubles = np.square(codec.decode(blocks) - values).sum(axis=1, dtype=np.float64)
    return found


# --- Where to begin ---


def _best_start(codec: BlockCodec, blocks: Bytes, values: Floats) -> ScaleNumbers:
    """Of each block the best scales among those that are there and some that follow from the values, each fitted once.

    What ggml chooses for its simple types is among them.
    """
    base, grouped = codec.scales.numbers(blocks), values.reshape(len(values), -1, codec.group)
    ranges: Iterable[StepsAndOffsets] = _of_ranges(codec, grouped)
    if codec.scales.offset is not None or codec.scales.groups is not None:
        every = list(ranges)
        in_full = 1 if codec.scales.offset is not None else 2  # of larger blocks: as many as a group's range has signs
        ranges = [*every[: None if codec.scales.groups is None else in_full], _best_of_groups(codec, grouped, every)]
    best, least = base, np.full(len(blocks), np.inf)
    for start in itertools.chain([base], (_stored(codec, *each) for each in ranges)):
        sums = _Sums.of(codec, codec.nearest_on(*start.products(), values), grouped)
        found = _fitted(codec, start, base, sums)
        errors = sums.errors(*found.products()).sum(axis=1)
        best = ScaleNumbers(*_where((errors < least)[:, None], found, best))
        least = np.fmin(errors, least)
    return best


def _where(is_new: NDArray[np.bool_], new: Iterable[Any], old: Iterable[Any]) -> list[Any]:
    return [None if one is None else np.where(is_new, one, other) for one, other in zip(new, old, strict=True)]


def _of_ranges(codec: BlockCodec, values: Floats) -> Iterator[StepsAndOffsets]:
    """Steps and offsets by which the codes cover the values of each group, or a part of their range."""
    least, largest = codec.numbers.min(), codec.numbers.max()
    if codec.scales.offset is not None:
        low, high = (each(axis=2).astype(np.float64) for each in (values.min, values.max))
        low = low if codec.scales.groups is None else np.minimum(low, 0)
        for part in RANGE_PARTS:
            yield part * (high - low) / largest, low + (1 - part) / 2 * (high - low)
        return
    extreme = _extreme(values).astype(np.float64)
    if least == -largest:
        yield from ((part * np.abs(extreme) / largest, None) for part in POWERS)
    else:
        yield np.abs(extreme) / largest, None
        yield from ((part * extreme / least, None) for part in RANGE_PARTS)


def _extreme(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Along the last axis the largest value, or the least where its magnitude is larger beyond rounding."""
    low, high = values.min(axis=-1), values.max(axis=-1)
    found: NDArray[np.floating] = np.where(-low > high * CLEARLY_LARGER, low, high)
    return found


def _best_of_groups(codec: BlockCodec, values: Floats, starts: Iterable[StepsAndOffsets]) -> StepsAndOffsets:
    """Of each group the steps and offsets with the least error, after a fit to the codes of each start."""
    best: Any = (0, 0)
    least = np.full(values.shape[:2], np.inf)
    for steps, offsets in starts:
        sums = _Sums.of(codec, codec.nearest_on(steps, offsets, values.reshape(len(values), -1)), values)
        found = sums.fit(has_offsets=offsets is not None, may_be_above=codec.scales.groups is None)
        errors = np.fmax(sums.errors(*found), _EXACT * sums.xx())
        is_better = errors < CLEARLY_BETTER * least
        best = _where(is_better, found, best)
        least = np.where(is_better, errors, least)
    steps, offsets = best
    return steps, offsets


def _stored(codec: BlockCodec, steps: Floats, offsets: Floats | None) -> ScaleNumbers:
    """Numbers that can be stored, for steps and offsets of the groups."""
    scales = codec.scales

    def shared(number: BlockNumber | None, values: Floats | None) -> tuple[Floats | None, Floats | None]:
        if number is None or values is None:
            return None, None
        if scales.groups is None:
            return number.stored(values), None
        whole = number.stored(_extreme(values)[:, None] / np.float32(scales.least or scales.largest))
        return whole, _whole(codec, values / np.where(whole, whole, np.inf), np.zeros_like(values))

    (step, of_steps), (offset, of_offsets) = shared(scales.step, steps), shared(scales.offset, offsets)
    assert step is not None
    return ScaleNumbers(step, offset, of_steps, of_offsets)


# --- Scales and codes in turn ---


class _Sums(NamedTuple):
    """The elements x of each group, the numbers n of their codes, and sums over them, (blocks, groups)."""

    values: Floats  # (blocks, groups, elements)
    numbers: Floats
    x: Doubles
    n: Doubles
    xn: Doubles
    nn: Doubles
    size: int  # elements

    @classmethod
    def of(cls, codec: BlockCodec, codes: Bytes, values: Floats) -> _Sums:
        numbers = codec.numbers.take(codes).reshape(values.shape)
        parts = (values, numbers, values * numbers, np.square(numbers))
        x, n, xn, nn = (part.sum(axis=2, dtype=np.float64) for part in parts)
        return cls(values, numbers, x, n, xn, nn, values.shape[2])

    def fit(self, *, has_offsets: bool, may_be_above: bool) -> tuple[Floats, Floats | None]:
        """The steps and offsets of the least squared error; with offsets of 0 at most, where they may not be above."""
        steps, zeros = np.nan_to_num(_ratio(self.xn, self.nn)), np.zeros_like(self.xn)
        if not has_offsets:
            return steps.astype(np.float32), None
        both = _ratio(self.size * self.xn - self.x * self.n, self.size * self.nn - np.square(self.n))
        offsets = (self.x - both * self.n) / self.size
        is_free = np.isfinite(offsets) & (may_be_above | (offsets < 0))
        steps, offsets = np.where(is_free, both, steps), np.where(is_free, offsets, zeros)
        return np.maximum(steps, 0).astype(np.float32), offsets.astype(np.float32)

    def xx(self) -> Doubles:
        found: Doubles = np.square(self.values).sum(axis=2, dtype=np.float64)
        return found

    def errors(self, steps: Floats, offsets: Floats | None) -> Doubles:
        """The squared error of the groups on these steps and offsets."""
        rest = self.numbers * steps[..., None]
        rest -= self.values if offsets is None else self.values - offsets[..., None]
        found: Doubles = np.square(rest, out=rest).sum(axis=2, dtype=np.float64)
        return found


def _settled(codec: BlockCodec, blocks: Bytes, values: Floats, start: ScaleNumbers) -> tuple[Bytes, NDArray[np.bool_]]:
    """The blocks that fitting ends with, and whether each of them is ready."""
    result, places = blocks.copy(), np.arange(len(blocks))
    codec.scales.write(result, start)
    codes = codec.nearest(result, values)
    for _ in range(MOST_ROUNDS):
        if not len(places):
            break
        own, wanted = result[places], values[places]
        sums = _Sums.of(codec, codes[places], wanted.reshape(len(wanted), -1, codec.group))
        codec.scales.write(own, _fitted(codec, codec.scales.numbers(own), codec.scales.numbers(blocks[places]), sums))
        new = codec.nearest(own, wanted)
        is_other = (own != result[places]).any(axis=1) | (new != codes[places]).any(axis=1)
        result[places], codes[places] = own, new
        places = places[is_other]
    are_ready = np.ones(len(blocks), bool)
    are_ready[places] = False
    return codec.with_codes(result, codes), are_ready


def _fitted(codec: BlockCodec, numbers: ScaleNumbers, base: ScaleNumbers, sums: _Sums) -> ScaleNumbers:
    """Each number of the scales, one after the other: the nearest to its least-squares value beside all others.

    Those on which no element depends are the base's.
    """
    scales, (step, offset, steps, offsets) = codec.scales, numbers
    below = np.float64(0) if offset is None else offset * np.float64(1 if offsets is None else offsets)
    if steps is not None and base.steps is not None:
        steps = _whole(codec, _ratio(sums.xn - below * sums.n, sums.nn * step), base.steps)
    if offset is not None and offsets is not None and base.offsets is not None:
        offsets = _whole(
            codec,
            _ratio(sums.x - step * np.float64(steps) * sums.n, sums.size * offset.astype(np.float64)),
            base.offsets,
        )
    by_step, by_offset = (np.asarray(1 if each is None else each, np.float64) for each in (steps, offsets))
    below = np.float64(0) if offset is None else offset * by_offset
    step = _of_blocks(scales.step, by_step * (sums.xn - below * sums.n), np.square(by_step) * sums.nn, base.step)
    if offset is not None and scales.offset is not None and base.offset is not None:
        rest, counts = sums.x - step * by_step * sums.n, np.full_like(sums.x, sums.size)
        offset = _of_blocks(scales.offset, by_offset * rest, np.square(by_offset) * counts, base.offset)
    return ScaleNumbers(step, offset, steps, offsets)


def _whole(codec: BlockCodec, values: NDArray[np.floating], otherwise: Floats) -> Floats:
    """The nearest whole numbers of groups; others where the values are not finite."""
    found = np.clip(np.rint(values), codec.scales.least, codec.scales.largest)
    return np.where(np.isfinite(values), found, otherwise).astype(np.float32)


def _of_blocks(number: BlockNumber, above: Doubles, below: Doubles, otherwise: Floats) -> Floats:
    """The nearest numbers that can be stored to a ratio of sums over all groups; others where it has no value."""
    wanted = _ratio(above.sum(axis=1, keepdims=True), below.sum(axis=1, keepdims=True))
    return np.where(np.isnan(wanted), otherwise, number.stored(wanted))


def _ratio(above: Doubles, below: Doubles) -> Doubles:
    """A ratio; NaN where the divisor is zero."""
    return np.where(below == 0, np.nan, above / below)
