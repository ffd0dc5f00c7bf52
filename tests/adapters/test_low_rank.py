"""The best factors of a lower rank, against the SVD of the whole product."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from lora_export.adapters import low_rank
from lora_export.adapters import singular_values as svd
from lora_export.adapters.low_rank import refuse_beyond_pairs, resize_adapter
from lora_export.adapters.singular_values import Truncation
from lora_export.errors import InputRefused, WrongUsage
from lora_export.lora import Adapter, LoraPair
from lora_export.options.adapters import ResizeOptions
from lora_export.pairs.structured import HadamardPair, WholePair

RNG = np.random.default_rng(2)
A, B = RNG.normal(size=(3, 9)).astype(np.float32), RNG.normal(size=(7, 3)).astype(np.float32)


def test_the_values_of_a_product_are_those_of_the_whole_matrix() -> None:
    found = svd.of_product(B, A, -2.0)
    whole = -2.0 * (B.astype(np.float64) @ A)
    np.testing.assert_allclose(found.s, np.linalg.svd(whole)[1][:3], rtol=1e-12)
    np.testing.assert_allclose((found.u * found.s) @ found.vt, whole, atol=1e-12)
    assert found.energy == pytest.approx(np.sum(whole**2), rel=1e-12)


def test_factors_of_a_lower_rank_are_the_best() -> None:
    found = svd.of_product(B, A)
    a, b = found.factors(2)
    left = B.astype(np.float64) @ A - b.astype(np.float64) @ a
    assert (a.shape, b.shape, a.dtype) == ((2, 9), (7, 2), np.float32)
    assert np.linalg.norm(left) == pytest.approx(found.s[2], rel=1e-6)
    assert found.captured(2) == pytest.approx(1 - found.s[2] ** 2 / found.energy, rel=1e-12)


def test_factors_share_the_singular_values() -> None:
    a, b = svd.of_product(1000 * B, A / 1000).factors(3)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-6)


def test_the_least_rank_that_captures_a_share() -> None:
    found = svd.of_matrix(np.diag([3.0, 2.0, 1.0]))  # shares 9/14, 13/14, 1
    assert [found.rank_for(share) for share in (0.1, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert svd.SingularValues(found.u, found.s[:1], found.vt, found.energy).rank_for(0.9) is None


def test_a_wide_rank_is_no_obstacle() -> None:
    found = svd.of_product(np.ones((2, 5), np.float32), np.ones((5, 3), np.float32))
    np.testing.assert_allclose((found.u * found.s) @ found.vt, np.full((2, 3), 5.0), atol=1e-12)


def test_nothing_is_lost_of_a_zero_matrix() -> None:
    assert svd.of_product(np.zeros((2, 1), np.float32), np.ones((1, 2), np.float32)).captured(1) == 1.0


@pytest.mark.parametrize(
    ("truncation", "rank"),
    [
        (svd.Truncation(rank=2), 2),
        (svd.Truncation(rank=9), 3),
        (svd.Truncation(energy=0.9), 2),
        (svd.Truncation(rank=1, energy=0.9), 1),
        (svd.Truncation(rank=3, energy=0.1), 1),
    ],
)
def test_a_truncation_is_a_rank_a_share_or_both(truncation: svd.Truncation, rank: int) -> None:
    assert truncation.rank_of(svd.of_matrix(np.diag([3.0, 2.0, 1.0]))) == rank


@pytest.mark.parametrize(
    ("rank", "energy", "message"),
    [
        (None, None, "give rank=, or energy="),
        (0, None, "at least 1"),
        (None, 0.0, "above 0"),
        (2, 1.5, "at most 1"),
        (2, float("nan"), "above 0"),
    ],
)
def test_a_truncation_out_of_range_is_refused(rank: int | None, energy: float | None, message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        options = ResizeOptions("adapter", "out", rank=rank, energy=energy)
        svd.Truncation(options.rank, options.energy)


def test_shares_add_up_by_their_squared_norms() -> None:
    layers = [low_rank.LayerShare("a", (2, 2), 1, 2, 0.5, 2.0), low_rank.LayerShare("b", (2, 2), 1, 2, 1.0, 1.0)]
    assert low_rank.total_share(layers) == pytest.approx((0.5 * 4 + 1) / 5)
    assert low_rank.total_share([low_rank.LayerShare("a", (2, 2), 1, 1, 1.0, 0.0)]) == 1.0


def test_a_loha_of_a_high_rank_is_taken_as_its_matrix() -> None:
    shapes = {"a1": (3, 2, 4), "b1": (6, 3), "a2": (4, 2, 4), "b2": (6, 4)}
    pair = HadamardPair({name: RNG.normal(size=shape) for name, shape in shapes.items()}, 0.5)
    assert pair.rank == 12 > min(low_rank.matrix_shape(pair))
    values = np.linalg.svd(pair.delta().reshape(6, 8).astype(np.float64))[1]
    np.testing.assert_allclose(low_rank.of_pair(pair).s, values, rtol=1e-4)


def test_factors_that_are_larger_than_the_change_are_not_made() -> None:
    """B alone would have 300 x 90,000 entries, 0.1 GB in fp32."""
    factors = {name: RNG.normal(size=(300, 300)) for name in ("a1", "b1", "a2", "b2")}
    pair = HadamardPair(factors, 1.0)
    tracemalloc.start()
    low_rank.of_pair(pair)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_change_that_no_layer_has_is_refused_before_it_is_made() -> None:
    large = WholePair({"change": np.zeros((1, 1))}, 1.0)
    object.__setattr__(large, "shape_of_whole", (1 << 20, 1 << 20))
    with pytest.raises(InputRefused, match="1048576 x 1048576 entries: more than 268435456, which no layer has"):
        low_rank.whole_change(large)


# --- What is more than pairs of plain LoRA is named; all of it, for all adapters. ---


PAIR = LoraPair(np.ones((1, 2)), np.ones((3, 1)), 1.0)
PLAIN = Adapter("plain", "peft", {"fc": PAIR})
BESIDES = {"replaced": {"head.weight": np.ones(2)}, "biases": {"fc": np.ones(3)}, "added": {"n.weight": np.ones(2)}}
WHOLE = Adapter("whole", "peft", {"fc": PAIR}, **BESIDES)


def test_everything_is_named_at_once() -> None:
    with pytest.raises(InputRefused) as refused:
        refuse_beyond_pairs([PLAIN, WHOLE, Adapter("empty", "peft", {})], "x")
    assert str(refused.value).splitlines() == [
        "x can contain pairs of A and B alone:",
        "  whole: head.weight is saved whole",
        "  whole: fc has a bias of B",
        "  whole: n.weight has a change of a vector, such as the weight of a norm",
        "  empty: it has no pair",
    ]
    assert "plain:" not in str(refused.value)


def test_whole_tensors_may_be_allowed() -> None:
    with pytest.raises(InputRefused) as refused:
        refuse_beyond_pairs([WHOLE], "x", whole_ok=True)
    assert "head.weight" not in str(refused.value) and "bias of B" in str(refused.value)


# --- Pairs of a lower rank, against the SVD of the whole change in NumPy's fp64. ---


DRAWN = np.random.default_rng(3)
PAIRS = {
    "fc": LoraPair(DRAWN.normal(size=(4, 9)), DRAWN.normal(size=(7, 4)), 2.0),
    "conv": LoraPair(DRAWN.normal(size=(4, 3, 2, 2)), DRAWN.normal(size=(5, 4, 1, 1)), -0.5),
    "table": LoraPair(DRAWN.normal(size=(4, 11)), DRAWN.normal(size=(6, 4)), 1.0, embedding=True),
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
