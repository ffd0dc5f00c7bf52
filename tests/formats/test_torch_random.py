"""PyTorch's generator without PyTorch, against PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Stored
from lora_export.formats.peft_kinds.random_matrices import WIDE_FROM, Generator, vera

SEEDS = (0, 1, 777, 2**31, 2**32 + 5, 2**63 + 11, -3, *range(40, 60))


def of_torch(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_numbers_have_the_same_bits(seed):
    ours, theirs = Generator(seed, "seed"), of_torch(seed)
    for shape, bound in (((1,), 1.0), ((7, 9), 0.3), ((3, 701), math.sqrt(3) / 7), ((64, 64), 1e-3)):
        expected = torch.empty(shape).uniform_(-bound, bound, generator=theirs).numpy()
        assert np.array_equal(ours.uniform(shape, -bound, bound), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_permutation_starts_the_same(seed):
    for size, count in ((1, 1), (2, 2), (10, 10), (1000, 1000), (4096 * 33, 1000)):
        expected = torch.randperm(size, generator=of_torch(seed))[:count].numpy()
        assert np.array_equal(Generator(seed, "seed").start_of_permutation(size, count), expected)


@pytest.mark.slow  # PyTorch makes the whole permutation, of 1.7 GB
def test_the_largest_permutation_starts_the_same():
    expected = torch.randperm(WIDE_FROM - 1, generator=of_torch(7))[:1000].numpy()
    assert np.array_equal(Generator(7, "seed").start_of_permutation(WIDE_FROM - 1, 1000), expected)


def test_a_larger_permutation_is_refused():
    with pytest.raises(InputRefused, match="PyTorch shuffles 214,748,364 numbers in another way"):
        Generator(7, "seed").start_of_permutation(WIDE_FROM, 1000)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 15, 16, 17, 31, 32, 100, 4096])
def test_normal_numbers_are_nearly_the_same(size):
    expected = torch.empty(size).normal_(0, 0.5, generator=of_torch(size)).numpy()
    assert np.allclose(Generator(size, "seed").normal((size,), 0.5), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [None, True, 1.5, "7", 1 << 64, -(1 << 63) - 1])
def test_another_seed_is_refused(seed):
    with pytest.raises(InputRefused, match=r"projection_prng_key is .*; it must be an integer of 64 bits"):
        Generator(seed, "projection_prng_key")


def test_matrices_that_all_layers_share_are_drawn_once(monkeypatch):
    uniform, drawn = Generator.uniform, []
    monkeypatch.setattr(Generator, "uniform", lambda self, *way: drawn.append(way) or uniform(self, *way))
    parts = {"vera_lambda_d": np.ones(2, np.float32), "vera_lambda_b": np.ones(6, np.float32)}
    stored = Stored(parts, {"r": 2, "projection_prng_key": 4711}, {}, "a", 2, "VeRA")
    first, second = (vera(stored).for_shape((6, 4), [(6, 4), (6, 4)]) for _ in range(2))
    assert first.delta().any() and np.array_equal(first.delta(), second.delta())
    assert len(drawn) == 2  # A and B
