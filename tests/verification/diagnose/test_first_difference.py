"""Errors of a call's values, beside PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import LoraPair
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.diagnose import root_cause
from lora_export.verification.diagnose.first_difference import figures_of
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import prove
from support.diagnosed_graphs import (
    DOWN,
    KEY,
    LAYER,
    OUT,
    QUERY,
    RANK,
    SCALE,
    UP,
    VALUE,
    WORDS,
    Made,
    bert,
    delta,
    make,
    proven,
    the_adapter,
    the_dora,
)
from support.graphs import an_adapter, stored

REFERENCE = np.random.default_rng(0).normal(size=(2, 3, 4))


def test_pytorchs_own_error_sets_the_allowed_error() -> None:
    deployed = REFERENCE + 1e-6
    near, far = (figures_of(REFERENCE + error, REFERENCE, deployed) for error in (2e-6, 1e-3))
    assert near.error <= near.allowed < far.error
    assert math.isclose(near.deployed_error, 1e-6, rel_tol=1e-3)


def test_swapped_batch_and_length_are_read_either_way() -> None:
    swapped = np.ascontiguousarray(REFERENCE.swapaxes(0, 1))
    assert figures_of(swapped, REFERENCE, REFERENCE).error == 0
    assert figures_of(REFERENCE.reshape(-1), REFERENCE, REFERENCE).error == 0
    assert figures_of(REFERENCE[:1], REFERENCE, REFERENCE).error == math.inf


def test_wrong_integers_are_counted() -> None:
    ids = np.array([[1, 2, 3]])
    assert figures_of(np.array([[1, 9, 8]]), ids, ids) == (2.0, 0.0, 0.0)


# --- first difference ---


def base_weight(module: str) -> NDArray[np.float64]:
    return bert().module.get_submodule(module).weight.detach().double().numpy()  # type: ignore[union-attr, operator]


def in_head(change: NDArray[Any]) -> NDArray[Any]:
    change = change.copy()
    change[8:] = 0
    return change


def as_bf16(weight: NDArray[Any]) -> NDArray[Any]:
    return weight.astype(ml_dtypes.bfloat16).astype(np.float64)


MERGED: Mapping[str, tuple[str, Callable[[NDArray[Any]], NDArray[Any]], str]] = {
    "missing": (QUERY, lambda w: w - delta(QUERY), "its adapter is missing"),
    "half": (VALUE, lambda w: w - delta(VALUE) / 2, "has 0.5 times the correct strength (scale 3)"),
    "not divided": (KEY, lambda w: w + 4 * delta(KEY), "as if alpha were not divided by the rank, 5"),
    "left out": (DOWN, lambda w: w - delta(DOWN) * 2 / 3, "as if the scale, 3, were left out"),
    "upside down": (UP, lambda w: w - delta(UP) * 8 / 9, "as if the scale were inverted, 0.333333 for 3"),
    "twice": (OUT, lambda w: w + delta(OUT), "as if it were added twice"),
    "sign": (QUERY, lambda w: w - 2 * delta(QUERY), "has the wrong sign"),
    "neighbour's": (QUERY, lambda w: w - delta(QUERY) + delta(KEY), f"it has the adapter of {KEY}"),
    "transposed": (KEY, lambda w: w - delta(KEY) + delta(KEY).T, "its change, B A, is transposed"),
    "whole transposed": (VALUE, lambda w: w.T, "its weight is transposed"),
    "a head": (VALUE, lambda w: w - delta(VALUE) + in_head(delta(VALUE)), "missing in outputs 8 to 15 of 16"),
    "bf16": (UP, as_bf16, "its weights are rounded to bfloat16"),
    "no base": (OUT, lambda w: delta(OUT), "the base's weight is missing"),
    "other's base": (VALUE, lambda w: base_weight(KEY) + delta(VALUE), f"its weight is that of {KEY}"),
    "other base": (
        DOWN,
        lambda w: w + 0.01 * np.cos(np.arange(512)).reshape(16, 32),
        "off the sum of base and",
    ),
}


@pytest.mark.parametrize("defect", MERGED)
def test_wrongly_merged_weight_is_found_and_explained(defect: str, tmp_path: Path) -> None:
    module, damage, reason = MERGED[defect]
    made = make("merged", tmp_path, the_adapter())
    made.change(module, damage)
    result = proven(made, the_adapter())
    assert result.verdict.outcome is Outcome.DIFFERENT
    assert result.diagnosis is not None and result.diagnosis.first == module
    assert reason in result.diagnosis.why


def test_unexplained_fault_is_reported_as_such(tmp_path: Path) -> None:
    made = make("nodes", tmp_path, the_adapter())
    rng = np.random.default_rng(5)
    made.put(made.factor(f"{OUT}.lora_B.weight"), rng.standard_normal((RANK, 16)))
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == OUT
    assert root_cause.NOT_EXPLAINED in result.diagnosis.why


def b_transposed(made: Made) -> None:
    value = made.factor(f"{OUT}.lora_B.weight")
    made.put(value, stored(made.graph, value.name or "").reshape(16, RANK).T)


def b_times(factor: float, module: str) -> Callable[[Made], None]:
    def damage(made: Made) -> None:
        value = made.factor(f"{module}.lora_B.weight")
        made.put(value, stored(made.graph, value.name or "") * factor)

    return damage


def without_branch(made: Made) -> None:
    add = made.node(name=f"/{UP}/lora_B/Add")
    for node, index in add.outputs[0].uses():
        node.replace_input_with(index, add.inputs[0])


def reads_elsewhere(made: Made) -> None:
    """The insert_nodes of the attention's output reads the attention's input."""
    down = made.node(name=f"/{OUT}/lora_A/MatMul")
    (site,) = find_sites(made.graph).by_name[f"{QUERY}.weight"]
    down.replace_input_with(0, site.node.inputs[0])


def on_the_wrong_layer(made: Made) -> None:
    """The branches of query and key, swapped."""
    adds = [made.node(name=f"/{module}/lora_B/Add") for module in (QUERY, KEY)]
    products = [add.inputs[1] for add in adds]
    for add, product in zip(adds, reversed(products), strict=True):
        add.replace_input_with(1, product)
    made.graph.graph.sort()


def other_base(made: Made) -> None:
    made.change(VALUE, lambda w: w + 0.02 * np.sin(np.arange(256)).reshape(16, 16))


def without_bias(made: Made) -> None:
    made.put(made.factor(f"{UP}.bias"), np.zeros(32))


NODES: Mapping[str, tuple[str, Callable[[Made], None], str]] = {
    "B transposed": (OUT, b_transposed, "its B is transposed"),
    "rsLoRA": (KEY, b_times(5**0.5, KEY), "as if alpha were divided by the root of the rank"),
    "no branch": (UP, without_branch, "its adapter is missing"),
    "elsewhere": (OUT, reads_elsewhere, f"its adapter reads the input of {QUERY}"),
    "wrong layer": (QUERY, on_the_wrong_layer, f"it has the adapter of {KEY}"),
    "other base": (VALUE, other_base, "its stored weight is not the base's: they are"),
    "no bias": (UP, without_bias, "its bias is missing"),
}


@pytest.mark.parametrize("defect", NODES)
def test_wrongly_inserted_branch_is_found_and_explained(defect: str, tmp_path: Path) -> None:
    module, damage, reason = NODES[defect]
    made = make("nodes", tmp_path, the_adapter())
    damage(made)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == module
    assert reason in result.diagnosis.why


def test_one_missing_adapter_of_two_is_named(tmp_path: Path) -> None:
    both = the_adapter(), the_adapter("de", 1)
    made = make("nodes", tmp_path, *both)
    made.put(made.factor(f"{VALUE}.lora_B.de.weight"), np.zeros((RANK, 16)))
    result = proven(made, *both)
    assert result.diagnosis is not None and result.diagnosis.first == VALUE
    assert "its adapter de is missing" in result.diagnosis.why and "fr" not in result.diagnosis.why


def no_magnitude(made: Made) -> None:
    mul = made.node(name=f"/{KEY}/lora_magnitude_vector/Mul")
    for node, index in mul.outputs[0].uses():
        node.replace_input_with(index, mul.inputs[0])


def norm_of_the_base(made: Made) -> None:
    magnitude = the_dora().pairs[KEY].magnitude
    assert magnitude is not None
    length = magnitude / np.linalg.norm(base_weight(KEY), axis=1)
    made.put(made.factor(f"{KEY}.lora_magnitude_vector.weight"), length)


DORA: Mapping[str, tuple[Callable[[Made], None], str]] = {
    "no magnitude": (no_magnitude, "DoRA's magnitude is missing"),
    "norm of W": (norm_of_the_base, "divided by the norm of W, and not of W + BA"),
}


@pytest.mark.parametrize("defect", DORA)
def test_wrong_dora_is_explained(defect: str, tmp_path: Path) -> None:
    damage, reason = DORA[defect]
    made = make("nodes", tmp_path, the_dora())
    damage(made)
    result = proven(made, the_dora())
    assert result.diagnosis is not None and result.diagnosis.first == KEY
    assert reason in result.diagnosis.why


def test_wrongly_scaled_adapter_file_is_wrong_in_every_module(tmp_path: Path) -> None:
    made = make("inputs", tmp_path, the_adapter())
    made.values = {name: 1.1 * array if "lora_B" in name else array for name, array in made.values.items()}
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == QUERY
    assert "as if it were a tenth too strong" in result.diagnosis.why
    assert "5 are wrong, 5 in the same way" in result.diagnosis.why


def test_adapter_file_with_another_modules_factors_is_explained(tmp_path: Path) -> None:
    made = make("inputs", tmp_path, the_adapter())
    other = the_adapter().pairs[VALUE]
    made.values[f"{KEY}.lora_A.weight"] = other.a.T.copy()
    made.values[f"{KEY}.lora_B.weight"] = other.b.T * np.float32(SCALE)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == KEY
    assert f"it has the adapter of {VALUE}" in result.diagnosis.why


def test_graph_without_its_adapter_file_is_explained(tmp_path: Path) -> None:
    made = make("inputs", tmp_path, the_adapter())
    save_graph(made.graph, tmp_path, "graph.onnx")
    result = prove(OnnxRunner(tmp_path / "graph.onnx"), PyTorchReferences(bert(), [the_adapter()]))
    assert result.diagnosis is not None and result.diagnosis.first == QUERY
    assert "its adapter is missing" in result.diagnosis.why and "onnx_adapter=" in result.diagnosis.why


def test_wrong_adapter_id_names_the_correct_one(tmp_path: Path) -> None:
    made = make("rows", tmp_path, the_adapter(), the_adapter("de", 1))
    result = proven(made, the_adapter("de", 1))
    assert result.diagnosis is not None and result.diagnosis.first == QUERY
    assert "with adapter id 2 (de) its output would be correct" in result.diagnosis.why


def test_wrong_scale_in_one_module_of_rows_is_explained(tmp_path: Path) -> None:
    made = make("rows", tmp_path, the_adapter())
    b_times(3, DOWN)(made)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == DOWN
    assert "as if the scale, 3, were applied twice" in result.diagnosis.why
    assert "with adapter id" not in result.diagnosis.why


def without_mask(made: Made) -> None:
    """The attention's mask, replaced by ones."""
    shape = ir.node("Shape", [made.graph.graph.inputs[1]])
    one = ir.Value(name="one", const_value=ir.Tensor(np.array([1], np.int64), name="one"))
    made.graph.graph.register_initializer(one)
    ones = ir.node("Expand", [one, shape.outputs[0]])
    uses = made.graph.graph.inputs[1].uses()
    made.graph.graph.insert_before(made.graph.graph[0], [shape, ones])
    for node, index in uses:
        if node.op_type != "Shape":
            node.replace_input_with(index, ones.outputs[0])


def another_norm(made: Made) -> None:
    value = made.factor(f"{LAYER}.attention.output.LayerNorm.weight")
    made.put(value, 1.001 * stored(made.graph, value.name or ""))


def another_activation(made: Made) -> None:
    gelu = made.node(op_type="Gelu")
    relu = ir.node("Relu", [gelu.inputs[0]])
    made.graph.graph.insert_after(gelu, [relu])
    for node, index in gelu.outputs[0].uses():
        node.replace_input_with(index, relu.outputs[0])


BETWEEN = {
    "mask": (without_mask, VALUE, OUT, "it is as if the input attention_mask were all ones"),
    "norm": (another_norm, OUT, UP, "between the two, in no such layer"),
    "activation": (another_activation, UP, DOWN, "between the two, in no such layer"),
}


@pytest.mark.parametrize("mode", ["merged", "rows"])
@pytest.mark.parametrize("defect", BETWEEN)
def test_fault_between_modules_is_located(defect: str, mode: str, tmp_path: Path) -> None:
    damage, before, after, reason = BETWEEN[defect]
    made = make(mode, tmp_path, the_adapter())
    damage(made)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == after
    assert f"; {before}, which runs before it, agrees" in result.diagnosis.why
    assert reason in result.diagnosis.why


def test_missing_adapter_of_an_embedding_is_explained(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pair = LoraPair(0.3 * rng.standard_normal((2, 50)), 0.3 * rng.standard_normal((16, 2)), 1.0, embedding=True)
    adapter = an_adapter({WORDS: pair, **the_adapter().pairs}, sha256="ee")
    result = proven(make("nodes", tmp_path, the_adapter()), adapter)
    assert result.diagnosis is not None and result.diagnosis.first == WORDS
    assert "its adapter is missing" in result.diagnosis.why and "none is wrong" in result.diagnosis.why
