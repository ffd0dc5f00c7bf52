"""A search in fp64 for scales of ggml's blocks: a squared error that is possible, by other code than the writer's.

The codes cover the range of a group's values, or a part of it. A step of fp16 alone is then fitted once to the nearest
codes. In larger blocks, the steps and offsets of the groups are fitted before they are stored, and tried as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from lora_export.storage.gguf_blocks import BlockCodec
from lora_export.storage.gguf_scales import BlockNumber, PowerOfTwo
from lora_export.verification.parity import Wide

_AT_ONCE = 1 << 17  # values
_PARTS = (1.0, 0.92, 0.84, 0.76)  # of the range that the codes cover
_POWERS = (1.0, 2.0, 0.5, 4.0)  # instead, where steps are powers of two
_CLEARLY_LARGER, _CLEARLY_BETTER = 1 + 1e-6, 0.999  # values are those of the writer but for rounding
_EXACT = 1e-9  # of the squared values: errors below are rounding in fp32

_Scales = tuple[Wide, Wide]  # steps and offsets of groups, (blocks, groups)


def least_errors(codec: BlockCodec, values: Wide) -> Wide:
    """The least squared error found of each block of (blocks, elements); infinite without any."""
    count = max(1, _AT_ONCE // codec.type.elements)
    with np.errstate(all="ignore"):  # scales that cannot be stored are infinite: their errors are no numbers
        pieces = [
            _least(codec, values[first : first + count].reshape(-1, codec.type.elements // codec.group, codec.group))
            for first in range(0, len(values), count)
        ]
    return np.concatenate([np.empty(0), *pieces])


def _least(codec: BlockCodec, values: Wide) -> Wide:
    starts, scales = list(_covering(codec, values)), codec.scales
    if scales.offset is None and scales.groups is None and not isinstance(scales.step, PowerOfTwo):
        return functools.reduce(np.fmin, (_fitted_error(codec, values, start) for start in starts))
    if scales.groups is not None:
        starts, every = starts[: 1 if scales.offset is not None else 2], starts
        starts.append(_best_of_groups(codec, values, every))
    return functools.reduce(np.fmin, (_error(codec, values, start) for start in starts))


def _covering(codec: BlockCodec, values: Wide) -> Iterator[_Scales]:
    """Steps and offsets by which the largest codes reach the ends of the values, or of a part of their range."""
    least, largest = float(codec.numbers.min()), float(codec.numbers.max())
    low, high = values.min(axis=2), values.max(axis=2)
    if codec.scales.offset is not None:
        low = low if codec.scales.groups is None else np.minimum(low, 0)
        yield from ((part * (high - low) / largest, low + (1 - part) / 2 * (high - low)) for part in _PARTS)
        return
    extreme, none = _extreme(values), np.zeros_like(low)
    if isinstance(codec.scales.step, PowerOfTwo):
        yield from ((part * np.abs(extreme) / largest, none) for part in _POWERS)
        return
    yield np.abs(extreme) / largest, none
    yield from ((part * extreme / least, none) for part in _PARTS)


def _extreme(values: Wide) -> Wide:
    """Along the last axis the value of the largest magnitude; the positive one of two as large."""
    low, high = values.min(axis=-1), values.max(axis=-1)
    found: Wide = np.where(-low > high * _CLEARLY_LARGER, low, high)
    return found


def _best_of_groups(codec: BlockCodec, values: Wide, starts: list[_Scales]) -> _Scales:
    """The steps and offsets of the least error of each group, beside the codes nearest on one of the starts."""
    best, least = starts[0], np.full(values.shape[:2], np.inf)
    for start in starts:
        nearest = nearest_numbers(codec, values, start)
        found = _fitted(codec, nearest, values)
        errors = np.fmax(_squares(nearest, values, found), _EXACT * np.square(values).sum(axis=2))
        is_better = errors < _CLEARLY_BETTER * least
        best = np.where(is_better, found[0], best[0]), np.where(is_better, found[1], best[1])
        least = np.where(is_better, errors, least)
    return best


def _fitted(codec: BlockCodec, numbers: Wide, values: Wide) -> _Scales:
    """The least squares of each group; an offset of a group in a larger block is 0 at most."""
    alone = np.nan_to_num((numbers * values).sum(axis=2) / np.square(numbers).sum(axis=2))
    if codec.scales.offset is None:
        return alone, np.zeros_like(alone)
    middle, mean = numbers.mean(axis=2, keepdims=True), values.mean(axis=2)
    steps = ((numbers - middle) * values).sum(axis=2) / np.square(numbers - middle).sum(axis=2)
    offsets = mean - steps * middle[..., 0]
    is_free = np.isfinite(offsets) & (steps > 0) & ((offsets < 0) | (codec.scales.groups is None))
    return np.where(is_free, steps, np.maximum(alone, 0)), np.where(is_free, offsets, 0)


def _error(codec: BlockCodec, values: Wide, wanted: _Scales) -> Wide:
    """The squared error of each block on scales that can be stored for these."""
    scales = _stored(codec, wanted)
    found: Wide = _squares(nearest_numbers(codec, values, scales), values, scales).sum(axis=1)
    return found


def _fitted_error(codec: BlockCodec, values: Wide, wanted: _Scales) -> Wide:
    """The squared error on the steps that fit best to the codes nearest on these."""
    numbers = nearest_numbers(codec, values, _stored(codec, wanted))
    found: Wide = _squares(numbers, values, _stored(codec, _fitted(codec, numbers, values))).sum(axis=1)
    return found


def nearest_numbers(codec: BlockCodec, values: Wide, scales: _Scales) -> Wide:
    """The nearest of the numbers that codes have."""
    steps, offsets = (each[..., None] for each in scales)
    ordered = np.unique(codec.numbers).astype(np.float64)
    position = np.where(steps == 0, 0.0, (values - offsets) / np.where(steps == 0, 1.0, steps))
    found: Wide = ordered[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, position)]
    return found


def _squares(numbers: Wide, values: Wide, scales: _Scales) -> Wide:
    """The squared error of each group."""
    steps, offsets = (each[..., None] for each in scales)
    found: Wide = np.square(numbers * steps + offsets - values).sum(axis=2)
    return found


def _stored(codec: BlockCodec, wanted: _Scales) -> _Scales:
    """The nearest that can be stored; in a larger block, the largest group has the largest number."""
    steps, offsets = _in_block(codec, codec.scales.step, wanted[0]), np.zeros_like(wanted[1])
    return steps, offsets if codec.scales.offset is None else _in_block(codec, codec.scales.offset, wanted[1])


def _in_block(codec: BlockCodec, number: BlockNumber, wanted: Wide) -> Wide:
    scales = codec.scales
    if scales.groups is None:
        return number.stored(wanted).astype(np.float64)
    unit = number.stored(_extreme(wanted)[:, None] / (scales.least or scales.largest))
    whole = np.clip(np.rint(wanted / np.where(unit == 0, np.inf, unit)), scales.least, scales.largest)
    found: Wide = (unit * whole.astype(np.float32)).astype(np.float64)  # a product in fp32, as ggml has it
    return found
