"""One layer on its own input, by hand: the output it should have, and how far off it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lora_export.lora import LoraPair
from lora_export.plan import Step, Term
from lora_export.verification.diagnose.diagnosis import LayerObservation, apply_matrix, expected_dora_factors, factors
from support.plans import BA, matrix, pair

X = np.float64([[1, 0, 0], [0, 1, 2]])
W = np.float64([[1, 2, 3], [4, 5, 6]])
STEP = Step(matrix("fc.weight"), (Term("one", "fc", pair(scale=0.5), 2.0), Term("two", "fc", pair())))  # 2 * BA
BIAS = np.float64([1, -1])


def layer(y: Any = None, **fields: Any) -> LayerObservation:
    observed = LayerObservation("fc", X, np.zeros((2, 2)), W, **({"step": STEP} | fields))
    return observed if y is None else LayerObservation("fc", X, np.float64(y), W, **({"step": STEP} | fields))


def test_the_expected_output_is_that_of_w_and_every_pair() -> None:
    merged = W + 2 * np.array(BA)
    observed = layer(bias=BIAS)
    assert observed.merged_weight().tolist() == merged.tolist()
    assert observed.expected.tolist() == (X @ merged.T + BIAS).tolist()
    assert observed.base_output.tolist() == (X @ W.T + BIAS).tolist()
    assert [part.tolist() for part in observed.pair_outputs] == [(X @ np.transpose(BA)).tolist()] * 2
    assert observed.merged_weight(0.5).tolist() == (W + np.array(BA)).tolist()


def test_a_layer_without_adapters_is_its_base() -> None:
    observed = layer(step=None)
    assert (observed.terms, observed.magnitude, observed.constant.tolist()) == ((), None, [0, 0])
    assert observed.expected.tolist() == (X @ W.T).tolist()


def test_rounded_weights_are_what_is_expected() -> None:
    rounded = np.round(W + 2 * np.array(BA), -1)
    observed = layer(rounded_weight=rounded)
    assert observed.expected.tolist() == (X @ rounded.T).tolist()
    difference = X @ (rounded - W - 2 * np.array(BA)).T
    assert observed.rounding_error == pytest.approx(np.sqrt(np.mean(difference**2)))
    assert layer().rounding_error == 0


def test_dora_rescales_every_output_but_the_bias() -> None:
    scaled = LoraPair(a=np.eye(3)[[0]], b=np.array([[3], [0]]), scale=1.0, magnitude=np.array([10, 2]))
    observed = LayerObservation(
        "fc", X, np.zeros((2, 2)), np.float64([[0, 4, 0], [0, 0, 0]]), bias=BIAS,
        step=Step(matrix("fc.weight"), (Term("ad", "fc", scaled),)),
    )  # fmt: skip
    # W + ΔW = [[3, 4, 0], [0, 0, 0]] -> [[6, 8, 0], [0, 0, 0]]: a row of zeros has no direction.
    assert observed.expected.tolist() == [[6 + 1, -1], [8 + 1, -1]]
    assert expected_dora_factors(np.array([10, 2]), observed.merged_weight()).tolist() == [2, 2]
    with_norms_of_the_base = observed.dora_product(np.array([10, 2]), observed.merged_weight(), observed.weight)
    assert with_norms_of_the_base[:, 0].tolist() == [7.5, 10]


def test_ids_look_up_columns() -> None:
    observed = LayerObservation("emb", np.array([2, 0]), np.zeros((2, 2)), W, step=STEP)
    assert observed.expected.tolist() == (W + 2 * np.array(BA)).T[[2, 0]].tolist()
    assert apply_matrix(np.array([1]), W).tolist() == [[2, 5]]


def test_a_kernel_is_flattened() -> None:
    kernel = LoraPair(a=np.arange(4).reshape(1, 2, 2), b=np.array([[[1]], [[10]]]), scale=1.0)
    a, b = factors(kernel)
    assert (a.tolist(), b.tolist(), a.dtype) == ([[0, 1, 2, 3]], [[1], [10]], np.float64)


def test_the_error_is_the_rmse_from_the_expected_output() -> None:
    right = layer().expected
    assert layer(right).agrees and layer(right).error == 0
    off = layer(right + np.float64([[0.5, 0], [0, 0]]))
    assert off.error == 0.25 and not off.agrees
    assert layer(right + np.float64([[0.5, 0], [0, 0]]), tolerance=0.25).agrees
    assert layer(right * np.float64([[np.nan, 1], [1, 1]])).error == math.inf


def test_the_rounding_of_fp32_is_allowed() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(50, 64)), rng.normal(size=(32, 64))
    in_fp32 = (x.astype(np.float32) @ weight.astype(np.float32).T).astype(np.float64)
    observed = LayerObservation("fc", x, in_fp32, weight)
    assert observed.error > 0 and observed.agrees
    assert not LayerObservation("fc", x, in_fp32 * (1 + 1e-4), weight).agrees


def test_large_terms_that_cancel_may_cost_more() -> None:
    x, weight = np.float64([[1e6, 1e6, 0.1]]), np.float64([[1 / 3, -1 / 3 + 1e-9, 1]])
    in_fp32 = (x.astype(np.float32) @ weight.astype(np.float32).T).astype(np.float64)
    observed = LayerObservation("fc", x, in_fp32, weight)
    assert observed.error > 1e-3 * abs(observed.expected[0, 0]) and observed.agrees
