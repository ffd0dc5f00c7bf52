"""New scales of ggml's blocks, judged: right ones pass, and each other byte is detected."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from lora_export.storage.gguf_blocks import CODECS, BlockCodec
from lora_export.storage.gguf_file import BY_NAME
from lora_export.verification.against_checkpoint.block_scales import beside_codes, wrong_scales
from lora_export.weights.gguf.new_scales import on_best_scales
from support.slow import slow

COUNT = 200
FEW = 10  # of the blocks, where not every bit is tried
EVERY = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.type.name)


def some(codec: BlockCodec, size: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks, values that are changed from theirs, and blocks with new scales for these."""
    base = blocks(codec.type.name)
    old = codec.decode(base)
    wanted = (old + size * np.random.default_rng(1).standard_normal(old.shape)).astype(np.float32)
    return base, wanted.astype(np.float64), on_best_scales(codec, base, wanted)


@functools.cache
def blocks(name: str) -> np.ndarray:
    codec = CODECS[BY_NAME[name]]
    numbers = np.random.default_rng(0).standard_normal((COUNT, codec.type.elements)).astype(np.float32)
    numbers[:, : codec.group] *= 1e-3  # a group of small numbers among larger ones
    made = on_best_scales(codec, np.zeros((COUNT, codec.type.nbytes), np.uint8), numbers)
    made.flags.writeable = False
    return made


@EVERY
@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
def test_right_scales_pass(codec: BlockCodec, size: float) -> None:
    base, value, new = some(codec, size)
    bound = 1e-6 * np.abs(value)
    moved = value + bound * np.random.default_rng(1).uniform(-1, 1, value.shape)  # as sums in fp64 differ
    assert wrong_scales(codec, base, new, moved, bound) == 0
    assert wrong_scales(codec, base, codec.encode(base, value.astype(np.float32)), value, bound) == 0


@EVERY
@pytest.mark.parametrize("every_bit", [False, slow(True)])
def test_each_other_byte_is_wrong(codec: BlockCodec, every_bit: bool) -> None:
    base, value, new = some(codec, 2.0)
    (is_new,) = np.nonzero((codec.with_codes(new, codec.codes_of(base)) != base).any(axis=1))
    is_new = is_new if every_bit else is_new[:FEW]
    is_long = codec.scales.groups is not None  # scales of groups take ten times as long
    for byte in np.flatnonzero(beside_codes(codec)):
        for bit in (5 * int(byte) % 8,) if is_long and not every_bit else range(8):
            other = new[is_new].copy()
            other[:, byte] ^= 1 << bit
            found = wrong_scales(codec, base[is_new], other, value[is_new], 0 * value[is_new])
            assert found >= 0.99 * len(is_new), bit  # of some blocks two neighbours are as good in fp32


@EVERY
def test_scales_for_other_values_are_wrong(codec: BlockCodec) -> None:
    base, value, _ = some(codec, 0.0)
    other = on_best_scales(codec, np.zeros_like(base), value.astype(np.float32) * np.float32(4))
    assert wrong_scales(codec, base, other, value, 0 * value) == COUNT


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K"])
def test_scales_that_are_further_away_are_wrong(name: str) -> None:
    """No number has a better neighbour, and the scales of the base have the values themselves."""
    codec = CODECS[BY_NAME[name]]
    base, value, _ = some(codec, 0.0)
    other = on_best_scales(codec, np.zeros_like(base), value.astype(np.float32))
    is_further = np.square(codec.decode(other) - value).sum(axis=1) > 1e-10 * np.square(value).sum(axis=1)
    assert is_further.any()
    assert wrong_scales(codec, base, other, value, 0 * value) >= is_further.sum()


def test_bytes_beside_the_codes() -> None:
    assert np.flatnonzero(beside_codes(CODECS[BY_NAME["Q5_0"]])).tolist() == [0, 1]
