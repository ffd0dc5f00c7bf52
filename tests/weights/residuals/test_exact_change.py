"""ΔW in exact integers: near to the sum of the pairs, and the same whatever the order of the sums."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from lora_export import sums
from lora_export.lora import EVERY_ROW, LoraPair
from lora_export.plan import Layout, Step, TensorSpec, Term
from lora_export.weights.residuals.prediction import ExactChange

RNG = np.random.default_rng(6)


def step(rank: int, layout: Layout = Layout.OUT_IN, *, terms: int = 1) -> Step:
    pairs = [
        LoraPair(
            RNG.normal(size=(rank, 7)) * 10.0 ** RNG.integers(-6, 6, 7),
            RNG.normal(size=(5, rank)) * 10.0 ** RNG.integers(-6, 6, (5, 1)),
            scale=0.3,
        )
        for _ in range(terms)
    ]
    shape = (7, 5) if layout.is_transposed else (5, 7)
    spec = TensorSpec("w", shape, "float32", layout)
    return Step(spec, tuple(Term(f"a{n}", "w", pair, 1.5) for n, pair in enumerate(pairs)))


@pytest.mark.parametrize("layout", [Layout.OUT_IN, Layout.IN_OUT])
@pytest.mark.parametrize("rank", [1, 3, 64])
def test_it_is_near_to_the_sum_of_the_pairs(layout: Layout, rank: int) -> None:
    own = step(rank, layout, terms=2)
    exact = sum(
        term.scale * (term.pair.b.astype(np.float64) @ term.pair.a.astype(np.float64)) for term in own.stored_terms
    )
    sizes = sum(np.abs(t.pair.b.astype(np.float64)).max(1)[:, None] * np.abs(t.pair.a).max(0) for t in own.stored_terms)
    found = ExactChange(own).rows(EVERY_ROW)
    assert np.abs(found - exact).max() > 0
    assert (np.abs(found - exact) <= 1e-5 * sizes).all()
    np.testing.assert_array_equal(ExactChange(own).rows(slice(2, 4)), found[2:4])


def test_every_sum_of_products_is_exact() -> None:
    # With Python's integers there is no rounding: equal bits mean that the product in fp64 had none either.
    own = step(64)
    change = ExactChange(own)
    (term,) = change._terms
    pair = own.terms[0].pair
    exponents = [Fraction(2) ** int(np.frexp(np.abs(row).max())[1]) for row in pair.b]
    for row, exponent in enumerate(exponents):
        unit = exponent / 2**term.bits
        b = [round(Fraction(float(value)) / unit) for value in pair.b[row]]
        for column in range(7):
            total = sum(x * int(y) for x, y in zip(b, term.a[:, column], strict=True))
            product = float(total * unit * Fraction(2) ** (int(term.exponents[column]) - term.bits))
            expected = product * float(np.float32(own.terms[0].scale))
            assert change.rows(slice(row, row + 1))[0, column] == expected


def test_a_shift_of_a_bias_is_itself() -> None:
    shift = np.array([1, 2, 3], np.float32)
    own = Step(TensorSpec("b", (3,), "float32"), shift=shift)
    assert ExactChange(own).rows(slice(1, 3)).tolist() == [[2], [3]]


def test_a_row_of_zeros_is_one() -> None:
    pair = LoraPair(np.zeros((2, 3)), np.ones((4, 2)), 1.0)
    own = Step(TensorSpec("w", (4, 3), "float32", Layout.OUT_IN), (Term("a", "w", pair),))
    np.testing.assert_array_equal(ExactChange(own).rows(EVERY_ROW), np.zeros((4, 3)))
    assert sums.delta(own).any() == ExactChange(own).rows(EVERY_ROW).any()
