"""Errors of a call's values, beside PyTorch's own."""

from __future__ import annotations

import dataclasses
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
from lora_export.lora import Adapter, LoraPair
from lora_export.verification.diagnose import root_cause
from lora_export.verification.diagnose.first_difference import figures_of
from lora_export.verification.parity import Outcome
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


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is damaged in a graph with an adapter, and what the diagnosis says: the first module, and why."""

    mode: str
    damage: Callable[[Made], object]
    first: str
    says: str | tuple[str, ...]
    inserted: tuple[Adapter, ...] = (the_adapter(),)
    judged: tuple[Adapter, ...] | None = None  # the right ones, where others were inserted
    never: str = "\0"  # what it does not say


# The weight of a module, with its adapter merged into it
MERGED: Mapping[str, tuple[str, Callable[[NDArray[Any]], NDArray[Any]], str]] = {
    "missing": (QUERY, lambda w: w - delta(QUERY), "its adapter is missing"),
    "half": (VALUE, lambda w: w - delta(VALUE) / 2, "has 0.5 times the correct strength (scale 3)"),
    "twice": (OUT, lambda w: w + delta(OUT), "as if it were added twice"),
    "neighbour's": (QUERY, lambda w: w - delta(QUERY) + delta(KEY), f"it has the adapter of {KEY}"),
    "transposed": (KEY, lambda w: w - delta(KEY) + delta(KEY).T, "its change, B A, is transposed"),
    "whole transposed": (VALUE, lambda w: w.T, "its weight is transposed"),
    "a head": (VALUE, lambda w: w - delta(VALUE) + in_head(delta(VALUE)), "missing in outputs 8 to 15 of 16"),
    "bf16": (UP, as_bf16, "its weights are rounded to bfloat16"),
    "no base": (OUT, lambda w: delta(OUT), "the base's weight is missing"),
    "other's base": (VALUE, lambda w: base_weight(KEY) + delta(VALUE), f"its weight is that of {KEY}"),
    "other base": (DOWN, lambda w: w + 0.01 * np.cos(np.arange(512)).reshape(16, 32), "off the sum of base and"),
}


def changed(module: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Made], None]:
    return lambda made: made.change(module, change)


def noise_as_b(made: Made) -> None:
    made.put(made.factor(f"{OUT}.lora_B.weight"), np.random.default_rng(5).standard_normal((RANK, 16)))


def b_transposed(made: Made) -> None:
    value = made.factor(f"{OUT}.lora_B.weight")
    made.put(value, stored(made.graph, value.name or "").reshape(16, RANK).T)


def b_times(factor: float, module: str, name: str = "") -> Callable[[Made], None]:
    def damage(made: Made) -> None:
        value = made.factor(f"{module}.lora_B{name}.weight")
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


def no_magnitude(made: Made) -> None:
    mul = made.node(name=f"/{KEY}/lora_magnitude_vector/Mul")
    for node, index in mul.outputs[0].uses():
        node.replace_input_with(index, mul.inputs[0])


def norm_of_the_base(made: Made) -> None:
    magnitude = the_dora().pairs[KEY].magnitude
    assert magnitude is not None
    length = magnitude / np.linalg.norm(base_weight(KEY), axis=1)
    made.put(made.factor(f"{KEY}.lora_magnitude_vector.weight"), length)


def stronger_file(made: Made) -> None:
    made.values = {name: 1.1 * array if "lora_B" in name else array for name, array in made.values.items()}


def file_of_another_module(made: Made) -> None:
    other = the_adapter().pairs[VALUE]
    made.values[f"{KEY}.lora_A.weight"] = other.a.T.copy()
    made.values[f"{KEY}.lora_B.weight"] = other.b.T * np.float32(SCALE)


def without_file(made: Made) -> None:
    made.values = None


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


def nothing(made: Made) -> None:
    """The graph is as it was made, for other adapters."""


def on_words() -> Adapter:
    """The adapter, and a pair of the embedding beside it."""
    rng = np.random.default_rng(0)
    pair = LoraPair(0.3 * rng.standard_normal((2, 50)), 0.3 * rng.standard_normal((16, 2)), 1.0, embedding=True)
    return an_adapter({WORDS: pair, **the_adapter().pairs}, sha256="ee")


BOTH, DORA = (the_adapter(), the_adapter("de", 1)), (the_dora(),)
AFTER, BETWEEN = "; {}, which runs before it, agrees", "between the two, in no such layer"
MASK = (without_mask, OUT, (AFTER.format(VALUE), "it is as if the input attention_mask were all ones"))
NORM = (another_norm, UP, (AFTER.format(OUT), BETWEEN))
ACTIVATION = (another_activation, DOWN, (AFTER.format(UP), BETWEEN))
NO_OTHER = ("its adapter is missing", "none is wrong")
OTHER_ID = "with adapter id 2 (de) its output would be correct"
ALL_SAME = ("as if it were a tenth too strong", "5 are wrong, 5 in the same way")
FAULTS = {
    **{f"merged, {name}": Fault("merged", changed(of, how), of, says) for name, (of, how, says) in MERGED.items()},
    "nodes, noise": Fault("nodes", noise_as_b, OUT, root_cause.NOT_EXPLAINED),
    "nodes, B transposed": Fault("nodes", b_transposed, OUT, "its B is transposed"),
    "nodes, rsLoRA": Fault("nodes", b_times(5**0.5, KEY), KEY, "as if alpha were divided by the root of the rank"),
    "nodes, no branch": Fault("nodes", without_branch, UP, "its adapter is missing"),
    "nodes, elsewhere": Fault("nodes", reads_elsewhere, OUT, f"its adapter reads the input of {QUERY}"),
    "nodes, wrong layer": Fault("nodes", on_the_wrong_layer, QUERY, f"it has the adapter of {KEY}"),
    "nodes, other base": Fault("nodes", other_base, VALUE, "its stored weight is not the base's: they are"),
    "nodes, no bias": Fault("nodes", without_bias, UP, "its bias is missing"),
    "nodes, one of two": Fault("nodes", b_times(0, VALUE, ".de"), VALUE, "its adapter de is missing", BOTH, never="fr"),
    "nodes, no embedding": Fault("nodes", nothing, WORDS, NO_OTHER, judged=(on_words(),)),
    "nodes, no magnitude": Fault("nodes", no_magnitude, KEY, "DoRA's magnitude is missing", DORA),
    "nodes, norm of W": Fault("nodes", norm_of_the_base, KEY, "divided by the norm of W, and not of W + BA", DORA),
    "inputs, stronger": Fault("inputs", stronger_file, QUERY, ALL_SAME),
    "inputs, another's": Fault("inputs", file_of_another_module, KEY, f"it has the adapter of {VALUE}"),
    "inputs, no file": Fault("inputs", without_file, QUERY, ("its adapter is missing", "onnx_adapter=")),
    "rows, another id": Fault("rows", nothing, QUERY, OTHER_ID, BOTH, BOTH[1:]),
    "rows, scale": Fault(
        "rows", b_times(3, DOWN), DOWN, "as if the scale, 3, were applied twice", never="with adapter id"
    ),
    "merged, mask": Fault("merged", *MASK),
    "merged, norm": Fault("merged", *NORM),
    "rows, mask": Fault("rows", *MASK),
    "rows, activation": Fault("rows", *ACTIVATION),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_its_module_and_explained(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    made = make(fault.mode, tmp_path, *fault.inserted)
    fault.damage(made)
    result = proven(made, *(fault.judged or fault.inserted))
    assert result.verdict.outcome is Outcome.DIFFERENT
    assert result.diagnosis is not None and result.diagnosis.first == fault.first
    for sentence in [fault.says] if isinstance(fault.says, str) else fault.says:
        assert sentence in result.diagnosis.why
    assert fault.never not in result.diagnosis.why
