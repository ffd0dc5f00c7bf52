"""Pairs of a lower rank, against the SVD of the whole change in NumPy's fp64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export.adapters.low_rank import Truncation, resize_adapter
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair

RNG = np.random.default_rng(3)
PAIRS = {
    "fc": LoraPair(RNG.normal(size=(4, 9)), RNG.normal(size=(7, 4)), 2.0),
    "conv": LoraPair(RNG.normal(size=(4, 3, 2, 2)), RNG.normal(size=(5, 4, 1, 1)), -0.5),
    "table": LoraPair(RNG.normal(size=(4, 11)), RNG.normal(size=(6, 4)), 1.0, embedding=True),
}
ADAPTER = Adapter("x", "peft", PAIRS, replaced={"head.weight": np.ones(2)}, sha256="1")


def singular_values(pair: LoraPair) -> np.ndarray:
    return np.linalg.svd(pair.delta().reshape(pair.shape[0], -1).astype(np.float64))[1][: pair.rank]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_is_the_best_of_that_rank(rank: int) -> None:
    resized, layers = resize_adapter(ADAPTER, Truncation(rank=rank))
    for (module, old), layer in zip(PAIRS.items(), layers, strict=True):
        new, values = resized.pairs[module], singular_values(old)
        assert (new.rank, new.scale, new.shape, new.embedding) == (rank, 1.0, old.shape, old.embedding)
        lost = np.linalg.norm(old.delta().astype(np.float64) - new.delta())
        assert lost == pytest.approx(np.sqrt(np.sum(values[rank:] ** 2)), rel=1e-5)
        assert layer.share == pytest.approx(np.sum(values[:rank] ** 2) / np.sum(values**2), rel=1e-6)
        assert (layer.module, layer.rank, layer.of_rank) == (module, rank, 4)
        assert layer.norm == pytest.approx(np.linalg.norm(values), rel=1e-6)


def test_an_energy_takes_the_least_rank_that_holds_it() -> None:
    resized, layers = resize_adapter(ADAPTER, Truncation(energy=0.9))
    for (module, old), layer in zip(PAIRS.items(), layers, strict=True):
        shares = np.cumsum(singular_values(old) ** 2) / np.sum(singular_values(old) ** 2)
        assert resized.pairs[module].rank == layer.rank == np.argmax(shares >= 0.9) + 1
        assert layer.share >= 0.9


def test_a_rank_that_is_too_large_keeps_the_change() -> None:
    resized, layers = resize_adapter(ADAPTER, Truncation(rank=64))
    for (module, old), layer in zip(PAIRS.items(), layers, strict=True):
        np.testing.assert_allclose(resized.pairs[module].delta(), old.delta(), atol=1e-5)
        assert (resized.pairs[module].rank, layer.share) == (4, 1.0)
    assert list(resized.replaced) == ["head.weight"] and resized.sha256 == ""


def test_a_group_has_one_rank() -> None:
    flat = LoraPair(np.ones((4, 9)), np.ones((7, 4)), 1.0)  # of rank 1
    pairs = {"one": flat, "one.out_proj": PAIRS["fc"], "two": PAIRS["fc"], "two.out_proj": flat}
    alone, _ = resize_adapter(Adapter("x", "peft", pairs), Truncation(energy=0.999))
    adapter = Adapter("x", "peft", pairs)
    grouped, layers = resize_adapter(adapter, Truncation(energy=0.999), lambda module: module.partition(".")[0])
    assert [pair.rank for pair in alone.pairs.values()] == [1, 4, 4, 1]
    assert [pair.rank for pair in grouped.pairs.values()] == [4] * 4 == [layer.rank for layer in layers]


def test_a_pair_of_zeros_stays_one() -> None:
    zero = replace(PAIRS["fc"], b=np.zeros((7, 4)))
    resized, layers = resize_adapter(Adapter("x", "peft", {"fc": zero}), Truncation(energy=0.9))
    assert (resized.pairs["fc"].rank, layers[0].share, layers[0].norm) == (1, 1.0, 0.0)


def test_what_cannot_be_resized_is_refused_by_name() -> None:
    dora = replace(PAIRS["fc"], magnitude=np.ones(7, np.float32))
    with pytest.raises(InputRefused, match="x: fc has DoRA's magnitude"):
        resize_adapter(Adapter("x", "peft", {"fc": dora}), Truncation(rank=1))
    huge = replace(PAIRS["fc"], scale=3e38)
    with pytest.raises(InputRefused, match="fc: the change holds values that float32 cannot hold"):
        resize_adapter(Adapter("x", "peft", {"fc": huge}), Truncation(rank=1))
