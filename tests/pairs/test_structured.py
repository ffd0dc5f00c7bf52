"""Pairs that are stored in another form: their products by the published formulas, in fp64."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.pairs.computed import (
    CirculantPair,
    FactoredPair,
    FlatKroneckerPair,
    FourierPair,
    SparsePair,
    sparse_pair,
)
from lora_export.pairs.structured import HadamardPair, KroneckerPair, WholePair
from lora_export.verification.against_checkpoint.fp64_sums import change_in_fp64

RNG = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def hadamard(
    out: int = 6, inner: tuple[int, ...] = (5,), ranks: tuple[int, int] = (2, 3)
) -> tuple[LoraPair, np.ndarray]:
    a1, b1, a2, b2 = (
        numbers(ranks[0], *inner),
        numbers(out, ranks[0]),
        numbers(ranks[1], *inner),
        numbers(out, ranks[1]),
    )
    one, other = (np.tensordot(b.astype(np.float64), a.astype(np.float64), 1) for b, a in ((b1, a1), (b2, a2)))
    return HadamardPair({"a1": a1, "b1": b1, "a2": a2, "b2": b2}, 0.75), one * other * 0.75


def kronecker(kernel: tuple[int, ...] = ()) -> tuple[LoraPair, np.ndarray]:
    w1, w2 = numbers(2, 3), numbers(4, 5, *kernel)
    product = np.einsum("ab,cd...->acbd...", w1.astype(np.float64), w2.astype(np.float64))
    return KroneckerPair({"w1": w1, "w2": w2}, 0.75), product.reshape(8, 15, *kernel) * 0.75


def test_a_factor_is_on_the_scale() -> None:
    for pair, change in (hadamard(), kronecker(), whole(3, 2)):
        part = pair.part(np.array([1, 0]), None).times(-2)
        np.testing.assert_allclose(part.delta(), -2 * change[[1, 0]], rtol=1e-5)


def whole(*shape: int) -> tuple[LoraPair, np.ndarray]:
    change = numbers(*shape)
    return WholePair({"change": change}, 0.75), change * np.float64(0.75)


def sparse() -> tuple[LoraPair, np.ndarray]:
    values, places = np.float32([2, -3, 5, 7]), np.array([[4, 0, 4, 5], [1, 3, 3, 0]])
    change = np.zeros((6, 5))
    for value, row, column in zip(values, *places, strict=True):
        change[row, column] = value * 0.75
    return SparsePair({"v": values}, 0.75, settings={"places": places, "shape": (6, 5)}), change


def circulant() -> tuple[LoraPair, np.ndarray]:
    kernels = np.arange(1, 13, dtype=np.float32).reshape(2, 2, 3)
    lines = [[1, 2, 3, 4, 5, 6], [3, 1, 2, 6, 4, 5], [2, 3, 1, 5, 6, 4]]
    return CirculantPair({"w": kernels}, 0.5), np.array([*lines, *(np.array(lines) + 6)]) * 0.5


def fourier() -> tuple[LoraPair, np.ndarray]:
    coefficients, frequencies = np.float32([3, -2, 4]), np.array([[0, 5, 5], [1, 0, 4]])
    p, q = np.arange(6)[:, None], np.arange(5)
    waves = [
        c * np.cos(2 * np.pi * (u * p / 6 + v * q / 5)) for c, u, v in zip(coefficients, *frequencies, strict=True)
    ]
    settings = {"shape": (6, 5), "frequencies": frequencies}
    return FourierPair({"c": coefficients}, 60, settings=settings), sum(waves) * 2


def flat_kronecker() -> tuple[LoraPair, np.ndarray]:
    w1, w2 = numbers(2, 3), numbers(4, 5, 3)
    change = np.stack([np.kron(w1.astype(np.float64), each) for each in w2])
    return FlatKroneckerPair({"w1": w1, "w2": w2}, 0.75), change.reshape(8, 15, 3) * 0.75


def factored() -> tuple[LoraPair, np.ndarray]:
    a, b, lengths = numbers(2, 5), numbers(6, 2), numbers(2)
    settings = {"shape": (2, 6, 5), "factors": lambda stored, rows: (stored["lengths"][:, None] * a, b[rows])}
    return FactoredPair({"lengths": lengths}, 0.75, settings=settings), (b * lengths).astype(np.float64) @ a * 0.75


FORMS = {
    "LoHa": hadamard(),
    "LoHa of a convolution": hadamard(inner=(5, 3, 3)),
    "LoKr": kronecker(),
    "LoKr of a convolution": kronecker((3, 3)),
    "whole matrix": whole(6, 5),
    "whole kernel": whole(6, 5, 3, 3),
    "few entries": sparse(),
    "circulant blocks": circulant(),
    "frequencies": fourier(),
    "LoKr of PEFT's Conv1d": flat_kronecker(),
    "factors of what is stored": factored(),
}


@pytest.mark.parametrize("name", FORMS)
class TestForm:
    def test_its_change_is_the_formula(self, name):
        pair, expected = FORMS[name]
        assert pair.shape == expected.shape
        assert pair.delta() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert pair.delta(slice(1, 4), strength=-2) == pytest.approx(-2 * expected[1:4], rel=1e-5, abs=1e-6)

    def test_its_factors_have_the_same_product(self, name):
        pair, expected = FORMS[name]
        a, b = pair.a.astype(np.float64), pair.b.reshape(len(pair.b), -1).astype(np.float64)
        assert (len(a), a.dtype) == (pair.rank, np.float64) and pair.b.shape[2:] == (1,) * (len(pair.shape) - 2)
        assert np.tensordot(b, a, 1) * pair.scale == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def test_a_part_of_it_is_the_part_of_its_change(self, name):
        pair, expected = FORMS[name]
        rows, columns = np.array([4, 0, 5]), np.array([3, 1])
        part = pair.part(rows, None).part(np.array([2, 0]), columns)
        assert part.delta() == pytest.approx(expected[[5, 4]][:, columns], rel=1e-5, abs=1e-6)
        b, a = part.b.reshape(len(part.b), -1), part.a
        assert np.tensordot(b, a, 1) * part.scale == pytest.approx(part.delta(), rel=1e-4, abs=1e-5)

    def test_it_is_written_into_given_memory(self, name):
        pair, _ = FORMS[name]
        memory = np.full(pair.shape, np.nan, np.float32)
        assert pair.delta(out=memory) is memory and np.isfinite(memory).all()

    def test_its_norm_is_that_of_its_change(self, name):
        pair, expected = FORMS[name]
        assert pair.norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)

    def test_verification_has_the_same_change_by_its_own_formula(self, name):
        pair, expected = FORMS[name]
        change = change_in_fp64(pair)
        assert (change is None) is isinstance(pair, HadamardPair) or type(pair) is FactoredPair
        if change is not None:
            whole = (change.values * pair.scale).reshape(expected.shape)
            assert whole == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert (change.steps.reshape(expected.shape) * abs(pair.scale) >= abs(expected) * (1 - 1e-6)).all()

    def test_it_changes_something(self, name):
        assert not FORMS[name][0].is_identity


def test_a_flattened_kernel_gets_its_shape():
    pair, expected = hadamard(inner=(45,))
    shaped = pair.with_kernel((3, 3))
    assert shaped.shape == (6, 5, 3, 3) == shaped.b.shape[:1] + shaped.a.shape[1:]
    assert shaped.delta() == pytest.approx(expected.reshape(6, 5, 3, 3), rel=1e-5, abs=1e-6)
    flat, expected = kronecker()
    assert flat.with_kernel((1, 1)).part(np.array([3]), None).delta().shape == (1, 15, 1, 1)
    with pytest.raises(InputRefused, match="a part of the inputs of a convolution is not supported"):
        shaped.part(None, np.array([0]))


def test_a_product_of_a_zero_factor_is_the_identity():
    assert KroneckerPair({"w1": np.zeros((2, 2)), "w2": numbers(3, 3)}, 1).is_identity
    assert WholePair({"change": numbers(2, 2)}, 0).is_identity
    assert not WholePair({"change": np.zeros((2, 2))}, 1, np.ones(2)).is_identity


def test_values_at_one_place_are_added_up():
    pair = sparse_pair(np.float32([1, 2, 4]), np.array([[0, 1, 0], [2, 0, 2]]), (2, 3))
    assert pair.delta().tolist() == [[0, 0, 5], [2, 0, 0]]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([[0, 2], [0, 0]], r"some of its places are outside of a weight \(2, 3\)"),
        ([[0, 1], [0, -1]], r"some of its places are outside of a weight \(2, 3\)"),
        ([[1, 1], [2, 2]], "two of its values have one place"),
        ([[0], [0]], r"\(2,\) values have places of the shape \(2, 1\)"),
    ],
)
def test_wrong_places_are_refused(places, message):
    with pytest.raises(InputRefused, match=message):
        SparsePair({"v": np.ones(2)}, 1.0, settings={"places": np.array(places), "shape": (2, 3)})


def test_a_product_counts_the_values_that_are_stored():
    assert KroneckerPair({"w1": numbers(2, 3), "w2": numbers(4, 5)}, 1, np.ones(8)).parameters == 6 + 20 + 8


def test_a_decomposed_factor_is_the_product_of_its_parts():
    up, down, core = numbers(2, 4), numbers(2, 5), numbers(2, 2, 3, 3)
    for stored, w2 in (
        ({"w2_a": up.T, "w2_b": down}, up.T @ down),
        ({"w2_a": up, "w2_b": down, "t2": core}, np.einsum("pqkl,po,qi->oikl", core, up, down)),
    ):
        w1 = {"w1_a": numbers(3, 2), "w1_b": numbers(2, 3)}
        pair = KroneckerPair({**w1, **stored}, 0.5)
        whole = KroneckerPair({"w1": w1["w1_a"] @ w1["w1_b"], "w2": w2}, 0.5)
        assert (pair.shape, pair.rank, pair.decomposed_rank) == (whole.shape, whole.rank, 2)
        assert whole.decomposed_rank is None
        np.testing.assert_allclose(pair.delta(), whole.delta(), rtol=1e-4, atol=1e-6)
        assert pair.norm == pytest.approx(whole.norm)
        assert pair.parameters == sum(value.size for value in (*w1.values(), *stored.values()))


def test_only_a_small_rank_is_low_rank():
    assert hadamard(out=64, inner=(64,), ranks=(2, 2))[0].is_low_rank
    assert not kronecker()[0].is_low_rank
    assert not whole(6, 5)[0].is_low_rank


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: HadamardPair(
                {"a1": numbers(2, 5), "b1": numbers(6, 3), "a2": numbers(2, 5), "b2": numbers(6, 2)}, 1
            ),
            "do not fit each other: a1 .2, 5., b1 .6, 3.",
        ),
        (
            lambda: HadamardPair(
                {"a1": numbers(2, 5), "b1": numbers(6, 2), "a2": numbers(2, 4), "b2": numbers(6, 2)}, 1
            ),
            "do not fit each other",
        ),
        (
            lambda: KroneckerPair({"w1": numbers(2), "w2": numbers(3, 3)}, 1),
            "the factors of a Kronecker product are .2,. and .3, 3.",
        ),
        (lambda: WholePair({"change": numbers(4)}, 1), "the change is .4,.; a matrix or the weight of a convolution"),
        (lambda: WholePair({"change": numbers(2, 2)}, np.inf), "the scale is inf"),
        (lambda: WholePair({"change": np.full((2, 2), np.nan)}, 1), "CHANGE holds 4 values that are not finite"),
        (lambda: WholePair({"change": numbers(2, 3)}, 1, np.ones(3)), "the magnitude is .3,., the change is .2, 3."),
    ],
)
def test_factors_that_do_not_fit_are_refused(make, message):
    with pytest.raises(InputRefused, match=message):
        make()


@pytest.mark.parametrize("name", FORMS)
def test_the_norm_is_that_of_the_change(name):
    pair, expected = FORMS[name]
    assert pair.norm == pytest.approx(np.linalg.norm(expected.ravel()), rel=1e-6)
    part = pair.part(np.array([1, 3]), None)
    assert part.norm == pytest.approx(np.linalg.norm(expected[[1, 3]].ravel()), rel=1e-6)


def test_the_norm_of_a_huge_product_is_not_computed():
    row, column = np.ones((1, 200_000), np.float32), np.ones((200_000, 1), np.float32)
    huge = HadamardPair({"a1": row, "b1": column, "a2": row, "b2": column}, 1.0)
    assert np.isnan(huge.norm)
    assert KroneckerPair({"w1": np.ones((999, 999)), "w2": np.ones((999, 999))}, 2.0).norm == pytest.approx(2 * 999**2)
