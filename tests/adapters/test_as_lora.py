"""Any change as a pair of A and B, against the SVD of the change in fp64. PEFT computes the same with the result."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn

from lora_export.adapters import low_rank
from lora_export.adapters.low_rank import as_lora
from lora_export.adapters.singular_values import Truncation
from lora_export.errors import InputRefused
from lora_export.formats import WriteOptions, writer_of
from lora_export.lora import Adapter, LoraPair
from lora_export.pairs.structured import HadamardPair, KroneckerPair, StructuredPair, WholePair

RNG = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def loha(rank: int, out: int, *columns: int) -> HadamardPair:
    factors = {
        "a1": normal(rank, *columns),
        "b1": normal(out, rank),
        "a2": normal(rank, *columns),
        "b2": normal(out, rank),
    }
    return HadamardPair(factors, -0.5)


class OtherPair(WholePair):
    """A change of which shape, rows and norm are known."""


LOW = normal(12, 3) @ normal(3, 10)
PAIRS = {
    "plain": LoraPair(normal(5, 10), normal(12, 5), 0.3),
    "plain convolution": LoraPair(normal(5, 4, 3, 3), normal(12, 5, 1, 1), 0.3),
    "embedding": LoraPair(normal(5, 10), normal(12, 5), 0.3, embedding=True),
    "LoHa": loha(2, 12, 10),
    "LoHa of a rank above the matrix's": loha(4, 12, 10),
    "LoHa convolution": loha(2, 12, 4, 3, 3),
    "LoKr": KroneckerPair({"w1": normal(3, 2), "w2": normal(4, 5)}, -2.0),
    "LoKr with factors": KroneckerPair({"w1": normal(3, 2), "w2_a": normal(4, 2), "w2_b": normal(2, 5)}, 0.5),
    "LoKr convolution with a core": KroneckerPair(
        {"w1": normal(3, 2), "w2_a": normal(2, 4), "w2_b": normal(2, 2), "t2": normal(2, 2, 3, 3)}, 0.5
    ),
    "a part of a LoKr": KroneckerPair({"w1": normal(3, 2), "w2": normal(4, 5)}, 1.0, rows=np.array([5, 0, 7, 1])),
    "whole": WholePair({"change": normal(12, 10)}, 1.0),
    "whole, of rank 3": WholePair({"change": LOW}, 1.0),
    "another kind": OtherPair({"change": normal(12, 10)}, 1.0),
}


def adapter(pair: LoraPair) -> Adapter:
    return Adapter("mine", "made", {"fc": pair})


@pytest.mark.parametrize("rank", [1, 2, 4, 6, 16])
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("by_blocks", [False, True])
def test_a_pair_is_the_best_of_its_rank(kind, rank, by_blocks, monkeypatch):
    if by_blocks:  # no matrix is small enough for LAPACK, and blocks have two rows
        monkeypatch.setattr(low_rank, "SMALL_CHANGE", 20)
    pair = PAIRS[kind]
    whole = pair.delta().astype(np.float64).reshape(pair.shape[0], -1)
    values = np.linalg.svd(whole, compute_uv=False)
    made, (layer,) = as_lora(adapter(pair), rank, 0.0)
    own = made.pairs["fc"]
    assert type(own) is LoraPair and own.shape == pair.shape and own.embedding is pair.embedding and own.rank <= rank
    lost = np.linalg.norm(own.delta().astype(np.float64).reshape(whole.shape) - whole) / np.linalg.norm(whole)
    best = np.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2))
    assert lost == pytest.approx(best, rel=1e-3, abs=2e-6)
    assert (layer.share, layer.norm) == pytest.approx((1 - best**2, np.linalg.norm(whole)), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "rank", "own"),
    [
        ("plain", 5, 5),
        ("LoHa", 4, 4),
        ("LoHa", 9, 4),
        ("LoKr", 8, 8),
        ("LoKr with factors", 8, 4),
        ("whole, of rank 3", 9, 3),
    ],
)
def test_a_rank_that_is_enough_loses_nothing(kind, rank, own):
    pair = PAIRS[kind]
    made, (layer,) = as_lora(adapter(pair), rank, 1.0)
    assert made.pairs["fc"].rank == own and layer.share == pytest.approx(1, abs=1e-9)
    if kind in ("plain", "LoHa"):  # the same factors, not others with the same product
        np.testing.assert_array_equal(made.pairs["fc"].a, pair.a)
        assert made.pairs["fc"].scale == pair.scale


def test_a_layer_that_loses_more_is_refused_by_name():
    two = replace(adapter(PAIRS["LoHa"]), pairs={"fc": PAIRS["LoHa"], "up": PAIRS["LoKr"], "low": PAIRS["plain"]})
    with pytest.raises(InputRefused) as refused:
        as_lora(two, 5, 1.0)
    text = str(refused.value)
    assert "mine as LoRA of rank 5 would lose a part of 1 of 3 layers" in text and "up: 0." in text
    assert "fc:" not in text and "min_kept=" in text
    _, layers = as_lora(two, 5, min_kept=min(0.9, layer_share(two, "up", 5)))
    assert [layer.rank for layer in layers] == [4, 5, 5]


def layer_share(one: Adapter, module: str, rank: int) -> float:
    return next(layer.share for layer in as_lora(one, rank, 0.0)[1] if layer.module == module)


def test_doras_magnitude_stays_beside_an_exact_change_only():
    exact = HadamardPair(PAIRS["LoHa"].stored, 1.0, magnitude=np.arange(1, 13))
    made, _ = as_lora(adapter(exact), 4, 1.0)
    np.testing.assert_array_equal(made.pairs["fc"].magnitude, np.arange(1, 13))
    with pytest.raises(InputRefused, match=r"fc: DoRA's magnitude is that of the exact change, and rank 2 has 0\."):
        as_lora(adapter(exact), 2, 0.0)


def test_modules_of_one_name_in_patterns_get_one_rank():
    pairs = {"mha": PAIRS["plain"], "mha.out_proj": PAIRS["whole, of rank 3"]}
    made, _ = as_lora(replace(adapter(PAIRS["plain"]), pairs=pairs), 8, 1.0, lambda module: module.split(".")[0])
    assert {pair.rank for pair in made.pairs.values()} == {5}


def test_tied_modules_have_one_pair_or_none():
    """Of tied tables with trained rows PEFT saves both, and neither has a pair."""
    of_table = replace(adapter(PAIRS["embedding"]), tied={"head": "fc"})
    made, _ = as_lora(of_table, 8, 1.0)
    np.testing.assert_array_equal(made.pairs["head"].a, made.pairs["fc"].b.T)
    rows = replace(adapter(PAIRS["plain"]), tied={"head": "table"})
    assert as_lora(rows, 8, 1.0)[0].pairs.keys() == {"fc"}


@pytest.mark.parametrize("kind", [kind for kind in PAIRS if kind not in ("embedding", "a part of a LoKr")])
def test_peft_computes_the_same_with_the_result(tmp_path: Path, kind):
    pair = PAIRS[kind]
    is_conv = len(pair.shape) > 2
    layer = nn.Conv2d(pair.shape[1], 12, 3, bias=False) if is_conv else nn.Linear(10, 12, bias=False)
    base = nn.ModuleDict({"fc": layer})
    before = layer.weight.detach().numpy().copy()
    made, _ = as_lora(adapter(pair), 12, 1.0 - 1e-6)
    writer_of("peft").write(made, tmp_path, WriteOptions())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()["fc"].weight.detach().numpy()
    np.testing.assert_allclose(theirs, before + pair.delta(), atol=2e-5)
    assert torch.is_tensor(layer.weight) and np.abs(pair.delta()).max() > 0.1


@pytest.mark.parametrize("rank", [1, 8, 30])
def test_the_best_of_nearly_equal_values_are_found_in_blocks(monkeypatch: pytest.MonkeyPatch, rank: int):
    """Of noise, the singular values fall slowly: two iterations of a subspace find 0.85 of what the best ones hold."""
    monkeypatch.setattr(low_rank, "SMALL_CHANGE", 1 << 12)
    whole = normal(400, 600)
    values = np.linalg.svd(whole.astype(np.float64), compute_uv=False)
    found = low_rank.of_pair(WholePair({"change": whole}, 1.0), Truncation(rank))
    best = np.sum(values[:rank] ** 2) / np.sum(values**2)
    assert 0.9995 * best < found.captured(rank) <= best * (1 + 1e-6)
    a, b = found.factors(rank)
    assert 1 - np.linalg.norm(whole - b @ a) ** 2 / np.sum(values**2) == pytest.approx(found.captured(rank), rel=1e-3)


def test_memory_is_a_few_columns_whatever_the_change(monkeypatch):
    """A change of 1500 x 1500 whose rows are computed one block at a time: 9 MB in fp32, 18 in fp64."""
    monkeypatch.setattr(low_rank, "SMALL_CHANGE", 1 << 16)
    b, a = normal(1500, 40), normal(40, 1500)

    class ByRows(StructuredPair):
        shape_of_whole = (1500, 1500)

        def _shape_of_whole(self) -> tuple[int, ...]:
            return (1500, 1500)

        @property
        def rank(self) -> int:
            return 1500

        def _product(self, rows: np.ndarray) -> np.ndarray:
            return b[rows] @ a

    pair = ByRows({}, 1.0)
    tracemalloc.start()
    found = low_rank.of_pair(pair, Truncation(rank=40))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.captured(40) > 0.999999 and peak < 8e6
