"""The numbers that ggml's scales are made of: what is read is written again, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.storage.gguf_blocks import CODECS, BlockCodec
from lora_export.storage.gguf_file import BY_NAME
from lora_export.storage.gguf_scales import PowerOfTwo, ScaleNumbers


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.type.name)
def test_numbers_are_written_as_they_were_read(codec: BlockCodec) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (300, codec.type.nbytes), dtype=np.uint8)
    blocks = blocks[np.isfinite(codec.largest(*codec.scales(blocks)))]
    numbers, codes = codec.scales.numbers(blocks), codec.codes_of(blocks)
    for found in (np.zeros_like(blocks), np.full_like(blocks, 255)):
        codec.scales.write(found, numbers)
        assert np.array_equal(codec.with_codes(found, codes), blocks)
    for each in (numbers.steps, numbers.offsets):
        if each is not None:
            assert (each.min(), each.max()) == (codec.scales.least, codec.scales.largest)


def test_numbers_that_are_stored_are_the_nearest() -> None:
    powers, wanted = PowerOfTwo(0), np.array([[1.4], [1.6], [3.0], [0.0], [-1.0], [1e-45], [1e38]])
    found = powers.stored(wanted)
    assert found[:3, 0].tolist() == [1, 2, 2] and found[3, 0] == found[4, 0] == found[5, 0] == 2.0**-128
    half = CODECS[BY_NAME["Q4_1"]].scales
    step, offset = (number.stored(np.array([[0.1]])) for number in (half.step, half.offset) if number is not None)
    assert step[0, 0] == offset[0, 0] == np.float16(0.1)
    assert ScaleNumbers(step, offset).products() == (step, offset)
