"""Weights of GPTQ as floats: packed here by hand, and packed and multiplied by auto-gptq."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.weights.quantised.gptq import gptq_weights
from support.quantised import OpenedWeight, Tensors, bits_of, example, opened


def packed(numbers: NDArray[np.int64], bits: int) -> torch.Tensor:
    """Each column's numbers as one long binary number, cut into words of 32 bits: (inputs, n) -> (words, n)."""
    words = -(-len(numbers) * bits // 32)
    columns = [sum(int(number) << (bits * place) for place, number in enumerate(column)) for column in numbers.T]
    cut = [[(value >> (32 * word)) & 0xFFFFFFFF for value in columns] for word in range(words)]
    return torch.from_numpy(np.array(cut, np.uint32).view(np.int32))


def by_hand(
    bits: int, inputs: int = 64, outputs: int = 32, groups: int = 2, *, first: bool = True, seed: int = 0
) -> tuple[Tensors, torch.Tensor]:
    """The stored tensors of a weight, and the weight: scale * (number - zero point), in fp32, rounded to fp16."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 1 << bits, (inputs, outputs))
    zeros = rng.integers(1 if first else 0, 1 << bits, (groups, outputs))
    scales = (rng.random((groups, outputs)) / 20 + 0.01).astype(np.float16)
    group_of_input = rng.permutation(np.arange(inputs) * groups // inputs)
    weight = scales[group_of_input].astype(np.float32) * (numbers - zeros[group_of_input])
    stored = {
        "x.qweight": packed(numbers, bits),
        "x.qzeros": packed((zeros - first).T, bits).T,
        "x.scales": torch.from_numpy(scales),
        "x.g_idx": torch.from_numpy(group_of_input.astype(np.int32)),
    }
    return stored, torch.from_numpy(weight.T.astype(np.float16))


def found(stored: Tensors, path: Path, **fields: object) -> OpenedWeight:
    return opened(path, stored, gptq_weights, {"quant_method": "gptq", **fields})


def test_words_by_hand() -> None:
    assert packed(np.array([[1], [2], [15]]), 4).tolist() == [[0xF21]]
    assert packed(np.array([[0]] * 10 + [[7]]), 3).tolist() == [[-(1 << 30)], [1]]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_is_scale_times_number_less_zero_point(bits: int, version: str, tmp_path: Path) -> None:
    stored, weight = by_hand(bits, first=version == "gptq")
    one = found(stored, tmp_path / "m.safetensors", bits=bits, checkpoint_format=version)
    assert (one.tensor.name, one.tensor.shape, one.tensor.scheme) == ("x.weight", (32, 64), f"gptq {bits}-bit")
    assert {*one.tensor.parts, one.tensor.packed} == stored.keys()
    for rows in (slice(0, 32), slice(5, 6), slice(7, 30)):
        assert bits_of(one.rows(rows)) == bits_of(weight[rows])
    other = "gptq" if version == "gptq_v2" else "gptq_v2"
    wrong = found(stored, tmp_path / "o.safetensors", bits=bits, checkpoint_format=other)
    assert bits_of(wrong.whole) != bits_of(weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_is_what_auto_gptq_multiplies_by(bits: int, tmp_path: Path) -> None:
    stored, weight = example(f"gptq {bits}")
    assert not stored["x.g_idx"].diff().ge(0).all()  # its inputs are in any order
    assert bits_of(found(stored, tmp_path / "m.safetensors", bits=bits).whole) == bits_of(weight)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 70),
    groups=st.integers(1, 4),
    seed=st.integers(0, 99),
    rows=st.tuples(st.integers(0, 69), st.integers(1, 70)),
)
def test_any_shape_and_any_rows_are_right(
    tmp_path: Path, bits: int, inputs: int, outputs: int, groups: int, seed: int, rows: tuple[int, int]
) -> None:
    """Inputs and outputs that do not fill their last words too."""
    inputs = 16 * inputs + seed % 5
    stored, weight = by_hand(bits, inputs, outputs, groups, seed=seed)
    one = found(stored, tmp_path / "m.safetensors", bits=bits)
    own = slice(min(rows[0], outputs - 1), max(min(rows[0], outputs - 1) + 1, min(rows[1], outputs)))
    assert bits_of(one.rows(own)) == bits_of(weight[own])


def test_zero_point_of_0_is_stored_as_the_largest_number(tmp_path: Path) -> None:
    """As gptqmodel reads version 1. auto-gptq 0.7.1 reads 2^bits, which it never writes."""
    stored, _ = by_hand(4)
    stored["x.qzeros"] = torch.full((2, 4), -1, dtype=torch.int32)
    weight = found(stored, tmp_path / "m.safetensors", bits=4).whole
    stored["x.qzeros"] = torch.zeros(2, 4, dtype=torch.int32)
    assert bits_of(weight) == bits_of(found(stored, tmp_path / "o.safetensors", checkpoint_format="gptq_v2").whole)


def test_groups_follow_each_other_where_none_are_stated(tmp_path: Path) -> None:
    stored, _ = by_hand(4)
    stored["x.g_idx"] = torch.arange(64, dtype=torch.int32) // 32
    expected = found(stored, tmp_path / "m.safetensors", bits=4).whole
    del stored["x.g_idx"]
    assert bits_of(found(stored, tmp_path / "o.safetensors", group_size=32).whole) == bits_of(expected)
    with pytest.raises(InputRefused, match=r"x\.g_idx is missing, and the config states no group_size"):
        found(stored, tmp_path / "p.safetensors", group_size=-1)
    one_group = by_hand(4, groups=1)
    del one_group[0]["x.g_idx"]
    assert bits_of(found(one_group[0], tmp_path / "q.safetensors", group_size=-1).whole) == bits_of(one_group[1])


def test_some_weights_may_have_other_bits_than_stated(tmp_path: Path) -> None:
    stored, weight = by_hand(8)
    assert bits_of(found(stored, tmp_path / "m.safetensors", bits=4).whole) == bits_of(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x.qweight": torch.zeros(8, 31, dtype=torch.int32)},
            r"qweight \[8, 31\], qzeros \[2, 4\] and scales \[2, 32\]",
        ),
        ({"x.qweight": torch.zeros(8, 32, 1, dtype=torch.int32)}, "is not that of a matrix"),
        ({"x.qweight": torch.zeros(0, 32, dtype=torch.int32)}, "is not that of a matrix"),
        ({"x.qweight": torch.zeros(8, 32, dtype=torch.int64)}, "its dtype is int64, and x.weight needs int32"),
        ({"x.qzeros": torch.zeros(2, 5, dtype=torch.int32)}, "are no weight of 2, 3, 4 or 8 bits"),
        ({"x.qzeros": torch.zeros(1, 4, dtype=torch.int32)}, "are no weight of"),
        ({"x.scales": torch.zeros(2, 32, dtype=torch.int32)}, "its dtype is int32"),
        ({"x.scales": torch.full((2, 32), torch.nan)}, "64 scales are not finite numbers"),
        ({"x.g_idx": torch.zeros(63, dtype=torch.int64), "x.qweight": torch.zeros(7, 32).int()}, "are no weight of"),
        ({"x.g_idx": torch.full((64,), 2)}, "an input is in none of the 2 groups"),
        ({"x.g_idx": torch.full((64,), -1)}, "an input is in none of the 2 groups"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: Tensors, message: str, tmp_path: Path) -> None:
    stored, _ = by_hand(4)
    with pytest.raises(InputRefused, match=message):
        found(stored | change, tmp_path / "m.safetensors", bits=4).rows(slice(0, 1))


@pytest.mark.parametrize("fields", [{"checkpoint_format": "marlin"}, {"format": "gptq_p"}])
def test_other_layouts_are_refused_by_name(fields: dict[str, str], tmp_path: Path) -> None:
    stored, _ = by_hand(4)
    with pytest.raises(InputRefused, match=f"gptq and gptq_v2, and this base has {next(iter(fields.values()))}"):
        found(stored, tmp_path / "m.safetensors", **fields)
