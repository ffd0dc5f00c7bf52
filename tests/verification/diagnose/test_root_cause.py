"""Causes of wrong outputs: outputs with a known fault, in numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora_export.lora import LoraPair
from lora_export.plan import Layout, Step, TensorSpec, Term
from lora_export.verification.diagnose.diagnosis import LayerObservation
from lora_export.verification.diagnose.root_cause import OtherModules, find_root_cause

# W (2, 2), B A = [[1, 2], [0, 0]], and x of three rows
W = np.array([[1.0, 0.0], [0.0, 1.0]])
A, B = np.array([[1.0, 2.0]]), np.array([[1.0], [0.0]])
X = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
DELTA = np.array([[1.0, 2.0], [0.0, 0.0]])


def a_step(*pairs: LoraPair, strength: float = 1.0) -> Step:
    terms = tuple(Term(f"a{number}", "m", pair, strength) for number, pair in enumerate(pairs))
    return Step(TensorSpec("m.weight", pairs[0].shape, "float32", Layout.OUT_IN), terms)


def observed(y: Any, scale: float = 2.0, **fields: Any) -> LayerObservation:
    """A layer with input X and output y, whose correct weight is W + scale · DELTA."""
    step = fields.pop("step", None) or a_step(LoraPair(A, B, scale))
    return LayerObservation("m", X, np.asarray(y, np.float64), W, step=step, **fields)


def test_correct_output_agrees() -> None:
    layer = observed(X @ (W + 2 * DELTA).T)
    np.testing.assert_array_equal(layer.expected, [[3, 0], [4, 1], [-1, -1]])
    assert layer.agrees and layer.error == 0
    assert not observed(X @ (W + 2.001 * DELTA).T).agrees


def test_a_guess_is_possible_for_the_adapter() -> None:
    """1/√rank is rsLoRA taken for LoRA, where the adapter is one; √rank is the reverse, or undivided."""
    rows = np.zeros((3, 2))
    pair = LoraPair(np.concatenate([A, rows]), np.concatenate([B, rows.T], axis=1), 3.0)
    for rslora, factor, text in (
        (True, 0.5, "as if alpha were divided by the rank, 4, and not by its root, as in rsLoRA"),
        (False, 0.5, ""),
        (True, 2, "alpha were not divided by the root of the rank, 4"),
        (False, 2, "alpha were divided by the root of the rank, as in rsLoRA, and not by the rank, 4"),
        (False, 4, "as if alpha were not divided by the rank, 4"),
        (True, 4, ""),
    ):
        step = replace(a_step(pair), terms=(Term("ad", "m", pair, rslora=rslora),))
        cause = find_root_cause(observed(X @ (W + factor * 3 * DELTA).T, step=step))
        assert cause is not None and f"{factor:g} times the correct strength" in str(cause)
        assert text in str(cause) and ("as if" in str(cause)) == bool(text)


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (0, "its adapter is missing"),
        (-1, "has the wrong sign"),
        (0.5, "has 0.5 times the correct strength (scale 2), as if the scale, 2, were left out"),
        (0.25, "as if the scale were inverted, 0.5 for 2"),
        (2, "as if it were added twice or the scale, 2, were applied twice"),
        (1.1, "as if it were a tenth too strong"),
        (0.7317, "its adapter has 0.7317 times the correct strength (scale 2)"),
    ],
)
def test_wrong_strength_is_measured_and_named(factor: float, text: str) -> None:
    cause = find_root_cause(observed(X @ (W + factor * 2 * DELTA).T))
    assert cause is not None and text in str(cause)
    assert ("as if" in str(cause)) == ("as if" in text)


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (4, "alpha were not divided by the rank, 4"),
        (0.25, "it were divided by the rank, 4, once more"),
        (1 / 3, "its weight, 3, were left out"),
        (3, "its weight, 3, were applied twice"),
    ],
)
def test_rank_and_weight_are_recognised_by_their_factors(factor: float, text: str) -> None:
    pair = LoraPair(np.concatenate([A, A, A, A]), np.concatenate([B, B, B, B], axis=1), 1.0)  # B A = 4 DELTA
    cause = find_root_cause(observed(X @ (W + factor * 12 * DELTA).T, step=a_step(pair, strength=3.0)))
    assert cause is not None and text in cause.text


def test_wrong_one_of_two_adapters_is_named() -> None:
    other = LoraPair(A[:, ::-1], B[::-1], 1.0)  # [[0, 0], [2, 1]]
    step = a_step(LoraPair(A, B, 2.0), other)
    cause = find_root_cause(observed(X @ (W + 2 * DELTA + 3 * DELTA[::-1, ::-1]).T, step=step))
    assert cause is not None and "its adapter a1 has 3 times the correct" in cause.text and "a0" not in cause.text


def test_outputs_and_rows_without_the_adapter_are_named() -> None:
    wide = LoraPair(A, np.ones((6, 1)), 1.0)
    has = np.array([1, 1, 0, 0, 1, 0])
    layer = LayerObservation("m", X, X @ np.outer(has, A[0]).T, np.zeros((6, 2)), step=a_step(wide))
    cause = find_root_cause(layer)
    assert cause is not None and cause.text == "its adapter is missing in outputs 2 to 3 and 5 of 6"
    y = X @ W.T + np.array([[1], [0], [1]]) * (X @ (2 * DELTA).T)
    cause = find_root_cause(observed(y))
    assert cause is not None and cause.text == "its adapter is missing in rows of its input 1 of 3"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (np.array([[1.0, 0.0], [2.0, 0.0]]), "its change, B A, is transposed"),
        (np.array([[1.0], [3.0]]) @ np.array([[0.0, 1.0]]), None),
    ],
)
def test_transposed_change_is_recognised_and_others_are_not(change: Any, text: str | None) -> None:
    cause = find_root_cause(observed(X @ (W + 2 * change).T))
    assert (cause and cause.text) == text


@pytest.mark.parametrize(("turn", "text"), [("B", "its B is transposed"), ("A", "its A is transposed")])
def test_transposed_factors_are_recognised(turn: str, text: str) -> None:
    a, b = np.arange(1.0, 7).reshape(2, 3), np.array([[1.0, 2], [0, 1], [3, 5], [1, 4]])
    x = np.eye(3)
    wrong_b = b.reshape(2, 4).T if turn == "B" else b
    wrong_a = a.reshape(3, 2).T if turn == "A" else a
    layer = LayerObservation("m", x, x @ (wrong_b @ wrong_a).T, np.zeros((4, 3)), step=a_step(LoraPair(a, b, 1.0)))
    cause = find_root_cause(layer)
    assert cause is not None and cause.text == text


def test_missing_double_and_other_biases_are_recognised() -> None:
    bias = np.array([1.0, -2.0])
    right = X @ (W + 2 * DELTA).T
    for y, text in (
        (right, "its bias is missing"),
        (right + 2 * bias, "its bias is added twice"),
        (right + np.array([5, 7]), "it has another bias"),
    ):
        cause = find_root_cause(observed(y, bias=bias))
        assert cause is not None and cause.text == text
    cause = find_root_cause(observed(right + bias - [0.5, 0], bias=bias, shift=np.array([0.5, 0.0])))
    assert cause is not None and cause.text == "the adapter's shift of its bias is missing"


def test_missing_whole_tensor_is_recognised() -> None:
    layer = LayerObservation("m", X, X @ DELTA.T, W, original_weight=DELTA)
    cause = find_root_cause(layer)
    assert cause is not None and "the adapter's whole tensor is missing" in cause.text


def test_mistakes_with_dora_are_recognised() -> None:
    magnitude = np.array([2.0, 3.0])
    step, bias = a_step(LoraPair(A, B, 2.0, magnitude)), np.array([1.0, 1.0])
    total = W + 2 * DELTA  # lengths 5 and 1
    lengths = np.array([5.0, 1.0])
    right = X @ (total * (magnitude / lengths)[:, None]).T + bias
    layer = observed(right, step=step, bias=bias)
    assert layer.agrees
    for y, text in (
        (X @ W.T + bias, "its adapter is missing"),
        (X @ total.T + bias, "DoRA's magnitude is missing"),
        (X @ (W * magnitude[:, None]).T + bias, "A and B are missing"),
        (X @ (total * magnitude[:, None]).T + bias, "divided by the norm of W"),
        (right - bias + bias * magnitude / lengths, "rescales the bias too"),
    ):
        cause = find_root_cause(replace(layer, y=y))
        assert cause is not None and text in cause.text


def test_rounding_is_recognised_by_the_rounded_values() -> None:
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((8, 8)), rng.standard_normal((20, 8))
    layer = LayerObservation("m", x, x @ w.astype(np.float16).astype(np.float64).T, w)
    cause = find_root_cause(layer)
    assert cause is not None and cause.text == "its weights are rounded to float16"
    noise = 2.0**-11 * np.abs(w) * rng.uniform(-1, 1, w.shape)
    cause = find_root_cause(replace(layer, y=x @ (w + noise).T))
    assert cause is None  # as large as rounding, but not rounding


def test_pairs_inputs_and_weights_of_others_are_recognised() -> None:
    other = LoraPair(A[:, ::-1], B[::-1], 1.0)
    others = OtherModules(steps={"n": a_step(other)}, inputs={"n": X[::-1]}, weights=lambda _: [("n", 3 * W + 1)])
    own, theirs = 2 * DELTA, DELTA[::-1, ::-1]
    for y, text in (
        (X @ (W + theirs).T, "it has the adapter of n"),
        (X @ (W + own + theirs).T, "it has the adapter of n beside its own"),
        (X @ W.T + X[::-1] @ own.T, "its adapter reads the input of n"),
        (X @ (3 * W + 1 + own).T, "its weight is that of n"),
    ):
        cause = find_root_cause(observed(y), others)
        assert cause is not None and cause.text == text
        assert find_root_cause(observed(y)) is None


def test_embedding_ids_select_columns() -> None:
    pair = LoraPair(np.array([[1.0, 0, 2]]), np.array([[1.0], [1.0]]), 1.0, embedding=True)
    w = np.array([[1.0, 2, 3], [4, 5, 6]])  # (width, words)
    layer = LayerObservation("m", np.array([2, 0]), np.array([[5.0, 8], [2, 5]]), w, step=a_step(pair))
    assert layer.agrees
    cause = find_root_cause(replace(layer, y=np.array([[3.0, 6], [1, 4]])))
    assert cause is not None and cause.text == "its adapter is missing"


def test_values_that_are_not_finite_are_the_cause() -> None:
    cause = find_root_cause(observed([[np.nan, 0], [4, 1], [-1, np.inf]]))
    assert cause is not None and cause.text == "2 of its 6 values are not finite"
