"""Weights of AWQ as floats: packed here by hand, and dequantised by autoawq."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.weights.quantised.awq import awq_weights
from support.quantised import OpenedWeight, Tensors, bits_of, example, opened

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs in a word, from its lowest bits on


def packed(numbers: NDArray[np.int64]) -> torch.Tensor:
    """(rows, outputs) -> (rows, outputs / 8) words."""
    places = [(output, 4 * place) for place, output in enumerate(ORDER)]
    words = [
        [sum(int(row[first + output]) << shift for output, shift in places) for first in range(0, len(row), 8)]
        for row in numbers
    ]
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def by_hand(inputs: int = 32, outputs: int = 24, groups: int = 2) -> tuple[Tensors, torch.Tensor]:
    """The stored tensors of a weight, and the weight: (number - zero point) * scale, in fp32, rounded to fp16."""
    rng = np.random.default_rng(0)
    numbers, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (groups, outputs))
    scales = (rng.random((groups, outputs)) / 20 + 0.01).astype(np.float16)
    size = inputs // groups
    weight = (numbers - zeros.repeat(size, 0)) * scales.astype(np.float32).repeat(size, 0)
    stored = {"x.qweight": packed(numbers), "x.qzeros": packed(zeros), "x.scales": torch.from_numpy(scales)}
    return stored, torch.from_numpy(weight.T.astype(np.float16))


def found(stored: Tensors, path: Path, **fields: object) -> OpenedWeight:
    return opened(path, stored, awq_weights, {"quant_method": "awq", **fields})


def test_word_by_hand() -> None:
    assert packed(np.array([[0, 1, 2, 3, 4, 5, 6, 7]])).view(torch.uint8).tolist() == [[0x20, 0x64, 0x31, 0x75]]


def test_weight_is_number_less_zero_point_times_scale(tmp_path: Path) -> None:
    stored, weight = by_hand()
    one = found(stored, tmp_path / "m.safetensors", version="gemm", bits=4, group_size=16)
    assert (one.tensor.name, one.tensor.shape, one.tensor.scheme) == ("x.weight", (24, 32), "awq 4-bit")
    assert {*one.tensor.parts, one.tensor.packed} == stored.keys()
    for rows in (slice(0, 24), slice(8, 16), slice(7, 9), slice(3, 23), slice(23, 24)):
        assert bits_of(one.rows(rows)) == bits_of(weight[rows])


def test_weight_is_what_autoawq_makes_of_it(tmp_path: Path) -> None:
    stored, weight = example("awq 4")
    assert bits_of(found(stored, tmp_path / "m.safetensors").whole) == bits_of(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x.qweight": torch.zeros(31, 3).int()},
            r"qweight \[31, 3\], scales \[2, 24\] and qzeros \[2, 3\] are no weight",
        ),
        ({"x.qweight": torch.zeros(32, 4).int()}, "are no weight of 4 bits"),
        ({"x.qweight": torch.zeros(32, 3, 1).int()}, "are no weight of 4 bits"),
        ({"x.qweight": torch.zeros(0, 3).int()}, "are no weight of 4 bits"),
        ({"x.scales": torch.zeros(0, 24)}, "are no weight of 4 bits"),
        ({"x.scales": torch.zeros(2, 25)}, "are no weight of 4 bits"),
        ({"x.qzeros": torch.zeros(1, 3).int()}, "are no weight of 4 bits"),
        ({"x.qzeros": torch.zeros(2, 3)}, "its dtype is float32, and x.weight needs int32"),
        ({"x.scales": torch.full((2, 24), torch.inf)}, "48 scales are not finite numbers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: Tensors, message: str, tmp_path: Path) -> None:
    stored, _ = by_hand()
    with pytest.raises(InputRefused, match=message):
        found(stored | change, tmp_path / "m.safetensors").rows(slice(0, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": "gemv"}, "AWQ of the version gemm in 4 bits, and this base has gemv in 4 bits"),
        ({"format": "llm-awq"}, "this base has llm-awq in 4 bits"),
        ({"version": "GEMM", "bits": 8}, "this base has gemm in 8 bits"),
    ],
)
def test_other_versions_are_refused_by_name(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    stored, _ = by_hand()
    with pytest.raises(InputRefused, match=message):
        found(stored, tmp_path / "m.safetensors", **fields)
