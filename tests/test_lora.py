"""The nouns, on matrices that a person can multiply: shapes, scales, sums, and what is refused at birth."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from lora_export import lora
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair, Rows, add, energies, fresh_pair

A = np.array([[1, 2, 3], [0, 1, 0]])  # (rank 2, in 3)
B = np.array([[1, 0], [2, 1]])  # (out 2, rank 2)
BA = [[1, 2, 3], [2, 5, 6]]


def pair(scale: float = 1.0) -> LoraPair:
    return LoraPair(a=A, b=B, scale=scale)


# --- LoraPair ---


def test_the_change_is_the_scaled_product_of_b_and_a():
    assert pair().delta().tolist() == BA
    assert pair(scale=0.5).delta().tolist() == [[0.5, 1, 1.5], [1, 2.5, 3]]
    assert pair(scale=0.5).delta(strength=-4).tolist() == [[-2, -4, -6], [-4, -10, -12]]
    assert pair().delta().dtype == np.float32


def test_some_rows_of_the_change_are_those_rows_of_it():
    assert pair().delta(slice(1, 2)).tolist() == [[2, 5, 6]]


@pytest.mark.parametrize("likes_pieces", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(1, 1, 1), (9, 7, 2), (300, 500, 16), (40, 9000, 16), (3, 20001, 24), (300, 500, 25), (200, 600, 64)],
)
def test_a_low_rank_is_multiplied_in_small_pieces_where_that_is_faster(monkeypatch, likes_pieces, rows, columns, rank):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (rank, columns)), rng.integers(-9, 10, (rows, rank))
    products: list[int] = []  # of each piece
    heights: list[int] = []
    calls = 0
    matmul = np.matmul

    def counted(one: np.ndarray, other: np.ndarray, out: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        for piece in one if one.ndim == 3 else [one]:
            products.append(piece.size * other.shape[1])
            heights.append(len(piece))
        matmul(one, other, out=out)

    monkeypatch.setattr(np, "matmul", counted)
    monkeypatch.setattr(lora, "_likes_pieces", lambda: likes_pieces)
    delta = LoraPair(a=a, b=b, scale=0.5).delta()
    assert np.array_equal(delta, 0.5 * (b @ a))
    assert sum(products) == rows * rank * columns
    if likes_pieces and rank <= 24:
        assert max(heights) >= min(rows, 8) and max(products) <= 1_000_000
        assert len(products) < 3 + sum(products) / 500_000 and calls <= 2 * len(set(products)) + 2
        assert all(height % 4 == 0 for height in set(heights) - {heights[-1]})
    else:
        assert len(products) == 1


def test_a_product_can_be_made_in_a_part_of_a_larger_array(monkeypatch):
    monkeypatch.setattr(lora, "_likes_pieces", lambda: True)
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (16, 9000)), rng.integers(-9, 10, (43, 16))
    whole = np.full((45, 9002), 7, np.float32)
    lora.multiply(b.astype(np.float32), a.astype(np.float32), whole[1:-1, 1:-1])
    assert np.array_equal(whole[1:-1, 1:-1], b @ a)
    whole[1:-1, 1:-1] = 7
    assert (whole == 7).all()


def test_rank_and_shape_are_those_of_the_weight():
    assert (pair().rank, pair().shape) == (2, (2, 3))


def test_the_transposed_pair_changes_the_transposed_weight():
    assert pair(scale=3).transposed.delta().tolist() == (3 * np.array(BA).T).tolist()


def test_the_pair_of_a_convolution_has_the_kernel_in_a():
    a = np.arange(8).reshape(1, 2, 2, 2)  # (rank, in, kernel, kernel)
    b = np.array([2, 3]).reshape(2, 1, 1, 1)  # (out, rank, 1, 1)
    convolution = LoraPair(a=a, b=b, scale=1)
    assert convolution.shape == (2, 2, 2, 2)
    assert convolution.delta().tolist() == [(2 * a[0]).tolist(), (3 * a[0]).tolist()]


def test_values_are_kept_in_fp32_whatever_they_were_stored_as():
    half = LoraPair(a=A.astype(np.float16), b=B.astype(ml_dtypes.bfloat16), scale=1)
    assert (half.a.dtype, half.b.dtype) == (np.float32, np.float32)
    assert half.delta().tolist() == BA


def test_a_pair_cannot_be_changed_and_leaves_the_callers_array_writable():
    mine = A.astype(np.float32)
    made = LoraPair(a=mine, b=B, scale=1)
    with pytest.raises(ValueError, match="read-only"):
        made.a[0, 0] = 9
    mine[0, 0] = 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": A[:1]}, r"the ranks disagree: A is \(1, 3\), B is \(2, 2\)"),
        ({"a": A[:0], "b": B[:, :0]}, r"a dimension is zero: A is \(0, 3\), B is \(2, 0\)"),
        ({"a": A[:, :0]}, "a dimension is zero"),
        ({"b": B[:0]}, "a dimension is zero"),
        ({"a": A[0]}, "both need at least two dimensions"),
        ({"b": B[0]}, "both need at least two dimensions"),
        ({"b": B.reshape(1, 2, 2)}, r"B is \(1, 2, 2\); beyond \(out, rank\) it may only have ones"),
        ({"scale": math.nan}, "the scale is nan"),
        ({"scale": -math.inf}, "the scale is -inf"),
        ({"magnitude": np.ones(3)}, r"the magnitude is \(3,\), B is \(2, 2\)"),
    ],
)
def test_what_does_not_go_together_is_refused_at_birth(changes, message):
    with pytest.raises(InputRefused, match=message):
        LoraPair(**{"a": A, "b": B, "scale": 1.0, **changes})


def test_a_magnitude_is_one_number_for_each_output():
    tall = np.array([[1, 0], [2, 1], [0, 3]])  # (out 3, rank 2)
    assert LoraPair(a=A, b=tall, scale=1, magnitude=np.array([1, 2, 3])).magnitude.tolist() == [1, 2, 3]
    with pytest.raises(InputRefused, match=r"the magnitude is \(2,\), B is \(3, 2\)"):
        LoraPair(a=A, b=tall, scale=1, magnitude=np.array([1, 2]))


@pytest.mark.parametrize("side", ["a", "b", "magnitude"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted_and_refused(side, poison):
    sides = {"a": A.astype(float), "b": B.astype(float), "magnitude": np.ones(2)}
    sides[side].flat[:2] = poison
    with pytest.raises(InputRefused, match=rf"^{side.upper()} holds 2 values that are not finite"):
        LoraPair(**sides, scale=1.0)


def test_a_pair_without_effect_says_so():
    assert not pair().is_identity
    assert pair(scale=0).is_identity
    assert LoraPair(a=A, b=0 * B, scale=1).is_identity
    assert LoraPair(a=0 * A, b=B, scale=1).is_identity


def test_a_magnitude_may_have_an_effect_of_its_own():
    assert not LoraPair(a=A, b=0 * B, scale=1, magnitude=np.ones(2)).is_identity


def test_rows_alone_are_an_effect():
    there = Adapter("a", "test", {}, rows={"e.weight": Rows(np.array([1]), np.ones((1, 2)))})
    assert not there.is_identity and there.parameters == 2
    assert Adapter("a", "test", {}).is_identity


def test_an_embeddings_pair_is_of_matrices():
    kernel = {"a": np.ones((1, 2, 3)), "b": np.ones((4, 1, 1))}
    with pytest.raises(InputRefused, match="for an embedding both are matrices"):
        LoraPair(**kernel, scale=1, embedding=True)


def test_energies_are_summed_in_fp64_over_all_but_the_outputs():
    weight = np.full((2, 3, 4), 1e25, np.float32)  # whose squares fp32 cannot hold
    np.testing.assert_allclose(energies(weight), [12e50] * 2, rtol=1e-6)
    assert energies(np.array([[3, 4], [5, 12]], np.float32).T).tolist() == [34, 160]


def test_a_fresh_pair_is_the_identity_and_its_a_is_uniform_within_one_over_the_root_of_in():
    fresh = fresh_pair((3, 400), rank=50, scale=2.0, rng=np.random.default_rng(0))
    assert fresh.is_identity and not fresh.b.any()
    assert (fresh.a.shape, fresh.b.shape, fresh.scale) == ((50, 400), (3, 50), 2.0)
    assert np.abs(fresh.a).max() <= 1 / 20
    assert fresh.a.std() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)  # of a uniform distribution
    assert abs(fresh.a.mean()) < 1e-3


# --- Adapter ---


def test_an_adapter_has_no_effect_only_where_nothing_in_it_has():
    idle = {"x": LoraPair(a=A, b=0 * B, scale=1)}
    assert Adapter("a", "peft", idle).is_identity
    assert Adapter("a", "peft", idle, biases={"x": np.zeros(2, np.float32)}).is_identity
    assert not Adapter("a", "peft", idle, biases={"x": np.ones(2, np.float32)}).is_identity
    assert not Adapter("a", "peft", {**idle, "y": pair()}).is_identity
    assert not Adapter("a", "peft", {}, replaced={"head.weight": np.zeros((2, 2), np.float32)}).is_identity


def test_an_adapter_counts_its_numbers_and_knows_its_spelling():
    adapter = Adapter(
        "a",
        "peft",
        {"x": pair()},
        replaced={"head.weight": np.ones((2, 5))},
        biases={"x": np.ones(2, np.float32)},
        spelling={"x": "base_model.model.x.lora_A.weight"},
    )
    assert adapter.parameters == 6 + 4 + 10 + 2
    assert adapter.spelled("x") == "base_model.model.x.lora_A.weight"
    assert adapter.spelled("y") == "y"
    with pytest.raises(TypeError):
        adapter.pairs["y"] = pair()


# --- add ---


def test_the_sum_is_rounded_once_and_to_the_even_neighbour():
    # Between 256 and 512 bf16 has every second number: 257 is a tie, and goes to 256; 259 to 260.
    weight = np.array([256, 256, 256], ml_dtypes.bfloat16)
    total = add(weight, np.array([1, 3, 1.001], np.float32))
    assert total.dtype == ml_dtypes.bfloat16
    assert total.astype(float).tolist() == [256, 260, 258]


def test_the_sum_is_made_in_fp32_whatever_the_target():
    # In fp16 alone 2048 + 1 is 2048; in fp32 it is 2049.
    assert add(np.array([2048], np.float16), np.array([1], np.float32), np.dtype(np.float32)).tolist() == [2049]


def test_an_fp64_weight_is_summed_in_fp64():
    assert add(np.array([1.0]), np.array([2**-40], np.float32)).tolist() == [1 + 2**-40]


def test_the_weight_itself_is_left_alone():
    weight = np.array([1], np.float32)
    assert add(weight, np.array([2], np.float32)).tolist() == [3]
    assert weight.tolist() == [1]


@pytest.mark.parametrize("scale", [2.0, -0.5, 0.3, 1.0])
def test_a_delta_goes_into_memory_that_is_there_and_its_bits_do_not_depend_on_when_it_was_scaled(scale):
    rng = np.random.default_rng(0)
    made = LoraPair(a=rng.standard_normal((3, 5)), b=rng.standard_normal((4, 3)), scale=scale)
    out = np.full((2, 5), np.nan, np.float32)
    returned = made.delta(slice(1, 3), strength=2.0, out=out)
    assert returned is out
    assert out.tobytes() == (made.b[1:3] @ made.a * np.float32(2 * scale)).tobytes()
