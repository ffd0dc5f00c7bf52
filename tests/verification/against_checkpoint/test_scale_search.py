"""The search for scales of blocks: what it finds can be stored, the writer is as near, and worse ones are seen."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

from lora_export.storage.gguf_blocks import CODECS, BlockCodec
from lora_export.storage.gguf_file import BY_NAME
from lora_export.verification.against_checkpoint.block_scales import wrong_scales
from lora_export.verification.against_checkpoint.scale_search import least_errors
from lora_export.weights.gguf.new_scales import on_best_scales

COUNT = 300
EVERY = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.type.name)
Values = np.ndarray
CHANGES: dict[str, Callable[[Values, np.random.Generator], Values]] = {
    "random": lambda old, rng: old + 0.3 * rng.standard_normal(old.shape),
    "heavy tails": lambda old, rng: old * np.exp(3 * rng.standard_normal(old.shape)),
    "spikes": lambda old, rng: np.where(np.arange(old.shape[1]) == 3, 10.0, old),
    "mostly zeros": lambda old, rng: 7 * old * (rng.random(old.shape) < 0.1),
    "zeros": lambda old, rng: 0 * old,
    "one sign": lambda old, rng: 3 * np.abs(old),
    "tiny": lambda old, rng: 1e-6 * (old + rng.standard_normal(old.shape)),
    "huge": lambda old, rng: 1e4 * (old + rng.standard_normal(old.shape)),
    "beyond fp16": lambda old, rng: 1e12 * (old + rng.standard_normal(old.shape)),
}


def based(codec: BlockCodec, count: int = COUNT) -> tuple[np.ndarray, Values]:
    blocks = blocks_of(codec.type.name, count)
    return blocks, codec.decode(blocks)


@functools.cache
def blocks_of(name: str, count: int) -> np.ndarray:
    codec = CODECS[BY_NAME[name]]
    numbers = np.random.default_rng(0).standard_normal((count, codec.type.elements)).astype(np.float32)
    blocks = on_best_scales(codec, np.zeros((count, codec.type.nbytes), np.uint8), numbers)
    blocks.flags.writeable = False
    return blocks


def squared(codec: BlockCodec, blocks: np.ndarray, values: Values) -> Values:
    return np.square(codec.decode(blocks).astype(np.float64) - values).sum(axis=1)


@EVERY
@pytest.mark.parametrize("change", CHANGES)
def test_the_writer_s_scales_pass(codec: BlockCodec, change: str) -> None:
    base, old = based(codec, COUNT if codec.scales.groups is None else COUNT // 4)  # 8 to 16 groups in each of these
    values = CHANGES[change](old, np.random.default_rng(1)).astype(np.float32)
    new, bound = on_best_scales(codec, base, values), np.abs(values) * 2.0**-24
    moved = values + bound * np.random.default_rng(2).uniform(-1, 1, values.shape)
    assert wrong_scales(codec, base, new, moved, bound) == 0


@EVERY
def test_what_is_found_is_about_the_writer_s(codec: BlockCodec) -> None:
    base, old = based(codec)
    values = CHANGES["random"](old, np.random.default_rng(1)).astype(np.float32)
    ratio = squared(codec, on_best_scales(codec, base, values), values) / least_errors(codec, values.astype(float))
    assert np.median(ratio) > 0.85 and np.isfinite(ratio).all()


@pytest.mark.parametrize(("name", "factor"), [("MXFP4", 2.0), ("Q8_0", 1.05), ("Q6_K", 1.05), ("Q5_0", 1.2)])
def test_other_scales_that_codes_settle_on_are_wrong(name: str, factor: float) -> None:
    """Codes and scales that are the best for each other, from steps that are too large."""
    codec = CODECS[BY_NAME[name]]
    base, old = based(codec)
    values = CHANGES["random"](3 * old, np.random.default_rng(1)).astype(np.float32)
    new = on_best_scales(codec, base, values)
    numbers, wrong = codec.scales.numbers(new), new.copy()
    step = codec.scales.step.stored(numbers.step * np.float32(factor))
    codec.scales.write(wrong, numbers._replace(step=step))
    wrong = codec.encode(wrong, values)
    is_worse = squared(codec, wrong, values) > 1.3 * squared(codec, new, values)
    assert is_worse.sum() > 20
    wide = values[is_worse].astype(np.float64)
    assert wrong_scales(codec, base[is_worse], wrong[is_worse], wide, 0 * wide) == is_worse.sum()


def test_no_blocks_have_no_errors() -> None:
    assert least_errors(CODECS[BY_NAME["Q8_0"]], np.zeros((0, 32))).shape == (0,)
