"""New scales of ggml's blocks. The package gguf and tries of every neighbour are the oracles."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.storage.gguf_blocks import CODECS, BlockCodec
from lora_export.storage.gguf_file import BY_NAME
from lora_export.storage.gguf_scales import Half, ScaleNumbers
from lora_export.weights.gguf.new_scales import on_best_scales
from support.gguf_files import Kind

Array = NDArray[np.float32]
EVERY = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.type.name)
BY_GGUF = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"]  # that its `quantize` knows


def some(codec: BlockCodec, count: int = 64) -> tuple[NDArray[np.uint8], Array]:
    """Blocks that are fitted to normal numbers, and their values."""
    numbers = np.random.default_rng(0).standard_normal((count, codec.type.elements)).astype(np.float32)
    blocks = on_best_scales(codec, np.zeros((count, codec.type.nbytes), np.uint8), numbers)
    return blocks, codec.decode(blocks)


def changed(old: Array, size: float) -> Array:
    rng = np.random.default_rng(1)
    return (old + size * rng.standard_normal(old.shape)).astype(np.float32)


def errors(codec: BlockCodec, blocks: NDArray[np.uint8], values: Array) -> NDArray[np.float64]:
    found = gguf.quants.dequantize(blocks, Kind(codec.type.number)).astype(np.float64)
    return np.square(found.reshape(len(blocks), -1) - values).sum(axis=1)


@EVERY
@pytest.mark.parametrize("size", [0.003, 0.1, 2.0])
def test_no_block_is_further_away_than_on_its_old_scales(codec: BlockCodec, size: float) -> None:
    blocks, old = some(codec)
    values = changed(old, size)
    values[:8] = old[:8]
    found = on_best_scales(codec, blocks, values)
    mine, its = (errors(codec, each, values) for each in (found, codec.encode(blocks, values)))
    assert (mine <= its * (1 + 1e-6)).all() and np.array_equal(found[:8], blocks[:8])
    if size == 2.0:  # values that the old scales do not reach
        assert mine.sum() < 0.35 * its.sum()


@pytest.mark.parametrize("name", BY_GGUF)
def test_no_block_is_further_away_than_gguf_s(name: str) -> None:
    codec = CODECS[BY_NAME[name]]
    blocks, old = some(codec, 2048)
    for size in (0.1, 2.0):
        values = changed(old, size)
        theirs = gguf.quants.quantize(values, Kind[name])
        assert (errors(codec, on_best_scales(codec, blocks, values), values) <= errors(codec, theirs, values)).all()


def neighbours(codec: BlockCodec, numbers: ScaleNumbers) -> Iterator[ScaleNumbers]:
    """The scales with one number replaced by the next smaller or larger one that can be stored."""
    scales = codec.scales
    for name, number in (("step", scales.step), ("offset", scales.offset)):
        own = getattr(numbers, name)
        for end in (-np.inf, np.inf) if own is not None else ():
            factor = np.float32(2 if end > 0 else 0.5)
            halves = np.nextafter(own.astype(np.float16), np.float16(end)).astype(np.float32)
            yield numbers._replace(**{name: halves if isinstance(number, Half) else own * factor})
    for name in ("steps", "offsets"):
        own = getattr(numbers, name)
        for group in range(0 if own is None else own.shape[1]):
            for change in (-1, 1):
                other = own.copy()
                other[:, group] = np.clip(other[:, group] + change, scales.least, scales.largest)
                yield numbers._replace(**{name: other})


@EVERY
def test_no_number_of_the_scales_has_a_better_neighbour(codec: BlockCodec) -> None:
    blocks, old = some(codec)
    values = changed(old, 2.0)
    found = on_best_scales(codec, blocks, values)
    least, tried = errors(codec, found, values), 0
    assert (codec.with_codes(found, codec.codes_of(blocks)) != blocks).any(axis=1).mean() > 0.8
    for numbers in neighbours(codec, codec.scales.numbers(found)):
        other = found.copy()
        codec.scales.write(other, numbers)
        assert (errors(codec, other, values) >= least * (1 - 1e-5)).all()
        tried += 1
    assert tried >= 2


@EVERY
def test_values_beyond_every_scale_keep_theirs(codec: BlockCodec) -> None:
    blocks, old = some(codec, 4)
    far = np.full_like(old, 1e30)
    found = on_best_scales(codec, blocks, far)
    assert np.isfinite(codec.decode(found)).all() or codec.type.name == "MXFP4"
    assert np.array_equal(on_best_scales(codec, blocks, old), blocks)
    zeros = on_best_scales(codec, blocks, np.zeros_like(old))
    assert np.array_equal(codec.decode(zeros), np.zeros_like(old))
