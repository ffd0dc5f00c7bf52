"""Blocks of ggml: decoded as the package gguf does, bit for bit, and encoded as the nearest codes on their scales."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.gguf_blocks import CODECS, RESOLVED, BlockCodec, as_tensor_file, codec_of, decoded, new_q8_0
from lora_export.storage.gguf_file import BY_NAME, open_gguf
from support.gguf_files import Kind, values_of, write_llama

EVERY = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.type.name)
WANTED = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "IQ4_NL", "IQ4_XS"}


def some_blocks(codec: BlockCodec, count: int = 300) -> NDArray[np.uint8]:
    """Random bytes, without those whose scales are no numbers."""
    found = np.random.default_rng(0).integers(0, 256, (count, codec.type.nbytes), dtype=np.uint8)
    return found[np.isfinite(codec.largest(*codec.scales(found)))]


def grid(codec: BlockCodec, blocks: NDArray[np.uint8]) -> NDArray[np.float64]:
    """All values that each element could have, (blocks, groups, 1, codes), in fp64."""
    steps, offsets = (
        None if each is None else each.astype(np.float64)[..., None, None] for each in codec.scales(blocks)
    )
    assert steps is not None
    found: NDArray[np.float64] = codec.numbers * steps + (0 if offsets is None else offsets)
    return found


def test_every_type_of_the_table_has_a_codec() -> None:
    assert {kind.name for kind in CODECS} == WANTED


@EVERY
def test_decoded_blocks_are_gguf_s_bit_for_bit(codec: BlockCodec) -> None:
    blocks = some_blocks(codec)
    theirs = gguf.quants.dequantize(blocks, Kind(codec.type.number))
    assert np.array_equal(codec.decode(blocks).view(np.uint32), theirs.view(np.uint32))


@EVERY
def test_values_that_do_not_change_keep_their_bytes(codec: BlockCodec) -> None:
    blocks = some_blocks(codec)
    blocks[:9] = 0  # a step of zero
    assert np.array_equal(codec.encode(blocks, codec.decode(blocks)), blocks)


@EVERY
def test_codes_are_the_nearest_on_scales_that_stay(codec: BlockCodec) -> None:
    blocks, rng = some_blocks(codec, 60), np.random.default_rng(1)
    blocks = blocks[codec.largest(*codec.scales(blocks)) < 1e30]
    old = codec.decode(blocks)
    wanted = old + np.float32(0.3) * np.abs(old).mean(axis=1, keepdims=True) * rng.standard_normal(old.shape)
    wanted = np.concatenate([wanted[:30], 9 * wanted[30:]]).astype(np.float32)  # half are beyond the last code
    found = codec.encode(blocks, wanted)
    assert np.array_equal(grid(codec, found), grid(codec, blocks))
    assert not np.array_equal(found, blocks)
    target = wanted.reshape(len(blocks), -1, codec.group).astype(np.float64)
    least = np.abs(target[..., None] - grid(codec, blocks)).min(axis=-1)
    distance = np.abs(codec.decode(found).reshape(target.shape) - target)
    scale = np.abs(target) + codec.largest(*codec.scales(blocks))[:, None, None]
    assert (distance - least <= 2.0**-21 * scale).all()


@EVERY
def test_the_other_code_has_the_next_value_beyond(codec: BlockCodec) -> None:
    blocks, rng = some_blocks(codec, 60), np.random.default_rng(1)
    blocks = blocks[codec.largest(*codec.scales(blocks)) < 1e30]
    old = codec.decode(blocks)
    wanted = old + np.float32(0.3) * np.abs(old).mean(axis=1, keepdims=True) * rng.standard_normal(old.shape)
    wanted = wanted.astype(np.float32)
    wanted[::2, ::3] = old[::2, ::3]  # these have no choice
    nearest = codec.nearest(blocks, wanted)
    other = codec.beyond(blocks, wanted, nearest)
    near, far = (codec.values_of(blocks, codes) for codes in (nearest, other))
    steps, offsets = codec.scales(blocks)
    is_odd = np.abs(0 if offsets is None else offsets) > RESOLVED * np.abs(steps)  # fp32 has one value for many codes
    has_choice = (near != far) & ~np.repeat(is_odd, codec.group, axis=1)
    assert has_choice.any() and not has_choice[::2, ::3].any()
    values = np.repeat(grid(codec, blocks)[:, :, 0], codec.group, axis=1)
    low, high = (each(near, far).astype(np.float64) for each in (np.minimum, np.maximum))
    slack = 2.0**-20 * codec.largest(*codec.scales(blocks))[:, None]
    assert ((low - slack <= wanted) & (wanted <= high + slack))[has_choice].all()
    is_between = (values > (low + slack)[..., None]) & (values < (high - slack)[..., None])
    assert not is_between[has_choice].any()
    same = codec.values_of(blocks, other) == old
    assert np.array_equal(other[same], codec.codes_of(blocks)[same])  # 0 and -0


def test_an_offset_beside_which_steps_vanish_keeps_its_codes() -> None:
    codec = CODECS[BY_NAME["Q4_1"]]
    blocks = some_blocks(codec, 40)
    blocks[:, :4] = np.array([6e-8, 2.0], np.float16).view(np.uint8)
    assert np.array_equal(codec.encode(blocks, codec.decode(blocks)), blocks)


def test_new_blocks_have_the_scale_of_ggml() -> None:
    values = np.random.default_rng(2).standard_normal((64, 32)).astype(np.float32)
    values[0] = 0
    ours, theirs = new_q8_0(values), gguf.quants.quantize(values, Kind.Q8_0)
    assert np.array_equal(ours[:, :2], theirs[:, :2])
    codec = CODECS[BY_NAME["Q8_0"]]
    errors = [np.abs(codec.decode(each) - values).sum() for each in (ours, theirs)]
    assert errors[0] <= errors[1] and not codec.decode(ours)[0].any()


def test_what_cannot_be_read_is_refused_by_name() -> None:
    codec = CODECS[BY_NAME["Q8_0"]]
    damaged = np.full((3, 34), 0x7C, np.uint8)  # fp16 numbers beyond the largest
    with pytest.raises(InputRefused, match=r"w: 3 blocks have scales that are no finite numbers"):
        decoded("w", codec, damaged)
    with pytest.raises(InputRefused, match=r"w is stored as IQ2_XXS, which is not supported; supported: BF16"):
        codec_of("w", BY_NAME["IQ2_XXS"])
    assert not np.isfinite(codec.decode(new_q8_0(np.full((1, 32), 1e9, np.float32)))).any()


def test_tensors_are_read_as_floats(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "a.gguf", lambda name: Kind.Q4_K if "mlp" in name else Kind.BF16)
    file = open_gguf(path)
    tensors = as_tensor_file(file, {one.name: one for one in file.tensors})
    assert all(np.array_equal(tensors.read(name), value) for name, value in values_of(path).items())
