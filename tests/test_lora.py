"""The types, on matrices that a person can multiply: shapes, scales, products, and what construction refuses."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from lora_export import lora
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair, ModuleEndings, TokenRows, new_pair

A = np.array([[1, 2, 3], [0, 1, 0]])  # (rank 2, in 3)
B = np.array([[1, 0], [2, 1]])  # (out 2, rank 2)
BA = [[1, 2, 3], [2, 5, 6]]


def pair(scale: float = 1.0) -> LoraPair:
    return LoraPair(a=A, b=B, scale=scale)


# --- LoraPair ---


def test_delta_is_the_scaled_product_of_b_and_a():
    assert pair().delta().tolist() == BA
    assert pair(scale=0.5).delta().tolist() == [[0.5, 1, 1.5], [1, 2.5, 3]]
    assert pair(scale=0.5).delta(strength=-4).tolist() == [[-2, -4, -6], [-4, -10, -12]]
    assert pair().delta().dtype == np.float32


def test_delta_of_some_rows_is_those_rows_of_the_whole():
    assert pair().delta(slice(1, 2)).tolist() == [[2, 5, 6]]


@pytest.mark.parametrize("blocks_are_faster", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(1, 1, 1), (9, 7, 2), (300, 500, 16), (40, 9000, 16), (3, 20001, 24), (300, 500, 25), (200, 600, 64)],
)
def test_a_low_rank_product_is_made_in_small_blocks_where_faster(monkeypatch, blocks_are_faster, rows, columns, rank):
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
    monkeypatch.setattr(lora, "_blocks_are_faster", lambda: blocks_are_faster)
    delta = LoraPair(a=a, b=b, scale=0.5).delta()
    assert np.array_equal(delta, 0.5 * (b @ a))
    assert sum(products) == rows * rank * columns
    if blocks_are_faster and rank <= 24:
        assert max(heights) >= min(rows, 8) and max(products) <= 1_000_000
        assert len(products) < 3 + sum(products) / 500_000 and calls <= 2 * len(set(products)) + 2
        assert all(height % 4 == 0 for height in set(heights) - {heights[-1]})
    else:
        assert len(products) == 1


def test_a_product_is_written_into_a_view_of_a_larger_array(monkeypatch):
    monkeypatch.setattr(lora, "_blocks_are_faster", lambda: True)
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (16, 9000)), rng.integers(-9, 10, (43, 16))
    whole = np.full((45, 9002), 7, np.float32)
    lora.multiply(b.astype(np.float32), a.astype(np.float32), whole[1:-1, 1:-1])
    assert np.array_equal(whole[1:-1, 1:-1], b @ a)
    whole[1:-1, 1:-1] = 7
    assert (whole == 7).all()


def test_shape_is_that_of_the_weight():
    assert (pair().rank, pair().shape) == (2, (2, 3))


def test_the_transposed_pair_changes_the_transposed_weight():
    assert pair(scale=3).transposed.delta().tolist() == (3 * np.array(BA).T).tolist()


def test_the_kernel_of_a_convolution_is_in_a():
    a = np.arange(8).reshape(1, 2, 2, 2)  # (rank, in, kernel, kernel)
    b = np.array([2, 3]).reshape(2, 1, 1, 1)  # (out, rank, 1, 1)
    convolution = LoraPair(a=a, b=b, scale=1)
    assert convolution.shape == (2, 2, 2, 2)
    assert convolution.delta().tolist() == [(2 * a[0]).tolist(), (3 * a[0]).tolist()]


def test_half_precision_factors_become_fp32():
    half = LoraPair(a=A.astype(np.float16), b=B.astype(ml_dtypes.bfloat16), scale=1)
    assert (half.a.dtype, half.b.dtype) == (np.float32, np.float32)
    assert half.delta().tolist() == BA


def test_a_pair_is_read_only_and_the_callers_array_stays_writable():
    mine = A.astype(np.float32)
    made = LoraPair(a=mine, b=B, scale=1)
    with pytest.raises(ValueError, match="read-only"):
        made.a[0, 0] = 9
    mine[0, 0] = 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": A[:1]}, r"A and B have different ranks: A is \(1, 3\), B is \(2, 2\)"),
        ({"a": A[:0], "b": B[:, :0]}, r"a dimension is zero: A is \(0, 3\), B is \(2, 0\)"),
        ({"a": A[:, :0]}, "a dimension is zero"),
        ({"b": B[:0]}, "a dimension is zero"),
        ({"a": A[0]}, "both need at least two dimensions"),
        ({"b": B[0]}, "both need at least two dimensions"),
        ({"b": B.reshape(1, 2, 2)}, r"B is \(1, 2, 2\); every dimension after \(out, rank\) must be 1"),
        ({"scale": math.nan}, "the scale is nan; it must be finite"),
        ({"scale": -math.inf}, "the scale is -inf; it must be finite"),
        ({"magnitude": np.ones(3)}, r"the magnitude is \(3,\), B is \(2, 2\)"),
    ],
)
def test_factors_that_disagree_are_refused(changes, message):
    with pytest.raises(InputRefused, match=message):
        LoraPair(**{"a": A, "b": B, "scale": 1.0, **changes})


def test_a_magnitude_has_one_number_per_output():
    tall = np.array([[1, 0], [2, 1], [0, 3]])  # (out 3, rank 2)
    assert LoraPair(a=A, b=tall, scale=1, magnitude=np.array([1, 2, 3])).magnitude.tolist() == [1, 2, 3]
    with pytest.raises(InputRefused, match=r"the magnitude is \(2,\), B is \(3, 2\)"):
        LoraPair(a=A, b=tall, scale=1, magnitude=np.array([1, 2]))


@pytest.mark.parametrize("factor", ["a", "b", "magnitude"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted_and_refused(factor, poison):
    factors = {"a": A.astype(float), "b": B.astype(float), "magnitude": np.ones(2)}
    factors[factor].flat[:2] = poison
    with pytest.raises(InputRefused, match=rf"^{factor.upper()} holds 2 values that are not finite"):
        LoraPair(**factors, scale=1.0)


def test_a_pair_with_a_zero_factor_or_scale_is_the_identity():
    assert not pair().is_identity
    assert pair(scale=0).is_identity
    assert LoraPair(a=A, b=0 * B, scale=1).is_identity
    assert LoraPair(a=0 * A, b=B, scale=1).is_identity


def test_a_pair_with_a_magnitude_is_never_the_identity():
    assert not LoraPair(a=A, b=0 * B, scale=1, magnitude=np.ones(2)).is_identity


def test_an_adapter_of_token_rows_alone_is_not_the_identity():
    adapter = Adapter("a", "test", {}, token_rows={"e.weight": TokenRows(np.array([1]), np.ones((1, 2)))})
    assert not adapter.is_identity and adapter.parameters == 2
    assert Adapter("a", "test", {}).is_identity


def test_an_embedding_pair_needs_matrices():
    kernel = {"a": np.ones((1, 2, 3)), "b": np.ones((4, 1, 1))}
    with pytest.raises(InputRefused, match="for an embedding both are matrices"):
        LoraPair(**kernel, scale=1, embedding=True)


def test_a_fresh_pair_has_uniform_a_and_zero_b():
    fresh = new_pair((3, 400), rank=50, scale=2.0, rng=np.random.default_rng(0))
    assert fresh.is_identity and not fresh.b.any()
    assert (fresh.a.shape, fresh.b.shape, fresh.scale) == ((50, 400), (3, 50), 2.0)
    assert np.abs(fresh.a).max() <= 1 / 20
    assert fresh.a.std() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)  # of a uniform distribution
    assert abs(fresh.a.mean()) < 1e-3


@pytest.mark.parametrize("scale", [2.0, -0.5, 0.3, 1.0])
def test_delta_is_written_into_out_with_the_bits_of_a_late_scaling(scale):
    rng = np.random.default_rng(0)
    made = LoraPair(a=rng.standard_normal((3, 5)), b=rng.standard_normal((4, 3)), scale=scale)
    out = np.full((2, 5), np.nan, np.float32)
    returned = made.delta(slice(1, 3), strength=2.0, out=out)
    assert returned is out
    assert out.tobytes() == (made.b[1:3] @ made.a * np.float32(2 * scale)).tobytes()


# --- Adapter ---


def test_an_adapter_is_the_identity_only_where_all_of_it_is():
    identity = {"x": LoraPair(a=A, b=0 * B, scale=1)}
    assert Adapter("a", "peft", identity).is_identity
    assert Adapter("a", "peft", identity, biases={"x": np.zeros(2, np.float32)}).is_identity
    assert not Adapter("a", "peft", identity, biases={"x": np.ones(2, np.float32)}).is_identity
    assert not Adapter("a", "peft", {**identity, "y": pair()}).is_identity
    assert not Adapter("a", "peft", {}, replaced={"head.weight": np.zeros((2, 2), np.float32)}).is_identity


def test_an_adapter_counts_its_parameters_and_knows_its_keys():
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


def test_the_outermost_saved_module_around_a_tensor_is_found():
    endings = ModuleEndings(["head8", "a_head7", "norm"])
    tensors = ["m.a_head7.head8.weight", "m.input_norm.weight", "norm.bias", "m.head81.weight", "m.norm", "head"]
    assert [endings.module_around(each) for each in tensors] == ["m.a_head7", "m.input_norm", "norm", "", "", ""]
