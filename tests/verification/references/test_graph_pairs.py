"""A graph without one pair computes what it computes of a plan that lacks this pair, up to the rounding of fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Plan
from lora_export.runtime.runner import Arrays
from lora_export.verification import pair_controls
from lora_export.verification.against_graph import control_graph_pairs
from lora_export.verification.pair_controls import PairControls
from lora_export.verification.parity import Case, EffectShare, MissingPart, Outputs
from lora_export.verification.references.base_graph import run_in_fp64
from lora_export.verification.references.graph_with_adapter import sum_at_weights
from support.graphs import a_graph, an_adapter, planned, quantised
from support.small_layers import turned_by_nothing

EXACT = 1e-12
LINEAR = """g (float[b, 4] x) => (float[b, 4] y) <float[4, 4] up.weight = {0}, float[4, 4] down.weight = {0}> {
    h = MatMul(x, up.weight) y = Gemm<transB: int = 1>(h, down.weight) }"""
LOOKUP = """g (int64[b, s] x) => (float[b, s, 4] y) <float[6, 4] up.weight = {0}, float[4, 4] down.weight = {0}> {
    h = Gather(up.weight, x) y = MatMul(h, down.weight) }"""
CONVOLUTION = """g (float[b, 4, l] x) => (float[b, 4, m] y)
    <float[4, 4, 3] up.weight = {0}, float[4, 4, 1] down.weight = {0}> {
    h = Conv(x, up.weight) y = Conv(h, down.weight) }"""


def filled(text: str) -> ir.Model:
    rng = np.random.default_rng(0)
    model = a_graph(text)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = rng.standard_normal(value.const_value.shape.numpy()).astype(np.float32)
        value.const_value = ir.Tensor(array, name=value.name)
    return model


def a_pair(seed: int, shape: tuple[int, ...], **options: Any) -> LoraPair:
    rng = np.random.default_rng(seed)
    out, inner, *kernel = shape
    a, b = rng.standard_normal((2, inner, *kernel)), rng.standard_normal((out, 2, *[1 for _ in kernel]))
    return LoraPair(a=a, b=b, scale=0.3, **options)


def shapes(text: str) -> dict[str, tuple[int, ...]]:
    """The shapes (out, in, ...) of both weights."""
    if text == CONVOLUTION:
        return {"up": (4, 4, 3), "down": (4, 4, 1)}
    return {"up": (4, 6) if text == LOOKUP else (4, 4), "down": (4, 4)}


def adapters(text: str, *, dora: bool) -> list[Adapter]:
    """An adapter of both weights, and another of one; DoRA has no other on its weight."""
    first = {
        module: a_pair(
            seed,
            shape,
            **({"magnitude": np.full(shape[0], 1.5, np.float32)} if dora else {}),
            **({"embedding": True} if text == LOOKUP and module == "up" else {}),
        )
        for seed, (module, shape) in enumerate(shapes(text).items())
    }
    second = {"down": a_pair(9, shapes(text)["down"])}
    return [an_adapter(first, name="one"), *([] if dora else [an_adapter(second, name="two")])]


INPUTS: dict[str, NDArray[Any]] = {
    LINEAR: np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32),
    LOOKUP: np.array([[0, 5, 2], [1, 1, 4]]),
    CONVOLUTION: np.random.default_rng(1).standard_normal((2, 4, 7)).astype(np.float32),
}


def summed(model: ir.Model, plan_of: Any, x: NDArray[Any], *given: Adapter) -> Arrays:
    model = model.clone()
    sites, plan = planned(model, *given)
    sum_at_weights(model, sites, plan_of(plan))
    return run_in_fp64(model, {"one": {"x": x}}).by_case["one"]


class Recorder:
    """Records the outputs that it is given; detects nothing."""

    def __init__(self) -> None:
        self.seen: list[Outputs] = []

    def __call__(self, case: Case, outputs: Outputs) -> MissingPart:
        self.seen.append(outputs)
        return MissingPart(changes_outputs=True, is_detected=False, share=EffectShare())


def controls(model: ir.Model, x: NDArray[Any], *given: Adapter) -> tuple[PairControls, list[Outputs]]:
    reference = summed(model, lambda plan: plan, x, *given)
    case = Case("one", "", reference=reference, deployed=reference, candidate=reference)
    judge, copy = Recorder(), model.clone()
    sites, plan = planned(copy, *given)
    found = control_graph_pairs(copy, sites, plan, {"one": {"x": x}}, [case], judge)
    return found, judge.seen


def without(module: str, adapter: str) -> Any:
    """A plan without the pair of an adapter at a module."""

    def change(plan: Plan) -> Plan:
        steps = []
        for step in plan.steps:
            terms = tuple(term for term in step.terms if (term.module, term.adapter) != (module, adapter))
            if terms:
                steps.append(replace(step, terms=terms))
        return replace(plan, steps=tuple(steps))

    return change


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "text", [LINEAR, *(pytest.param(text, marks=pytest.mark.slow) for text in (LOOKUP, CONVOLUTION))]
)
def test_each_pair_is_off_as_if_the_plan_lacked_it(text: str, dora: bool) -> None:
    model, x, given = filled(text), INPUTS[text], adapters(text, dora=dora)
    found, seen = controls(model, x, *given)
    pairs = [(module, adapter.name) for adapter in given for module in adapter.pairs]
    assert sorted(found.names) == sorted(f"{module} of {name}" if len(given) > 1 else module for module, name in pairs)
    right = summed(model, lambda plan: plan, x, *given)["y"]
    # Magnitudes are stored in fp32, and onnxruntime has no convolution in fp64.
    limit = 1e-4 if text == CONVOLUTION else 1e-6 if dora else EXACT
    for name, outputs in zip(found.names, seen, strict=True):
        module, _, adapter = name.partition(" of ")
        expected = summed(model, without(module, adapter or "one"), x, *given)["y"]
        assert np.abs(outputs["y"] - expected).max() < limit
        assert np.abs(outputs["y"] - right).max() > 1e-3


def test_pairs_beside_packed_weights_are_off_one_by_one() -> None:
    text = LINEAR.replace("4, 4", "32, 32").replace("b, 4", "b, 32")
    model = quantised(filled(text))
    given = an_adapter({"up": a_pair(0, (32, 32)), "down": a_pair(1, (32, 32))})
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    found, seen = controls(model, x, given)
    assert set(found.names) == {"up", "down"}
    for name, outputs in zip(found.names, seen, strict=True):
        expected = summed(model, without(name, given.name), x, given)["y"]
        assert np.abs(outputs["y"] - expected).max() < 1e-9


@pytest.mark.parametrize("nothing", [replace(a_pair(1, (4, 4)), scale=0.0), turned_by_nothing(4)])
def test_pairs_that_change_nothing_are_not_switched_off(nothing: LoraPair) -> None:
    given = an_adapter({"up": a_pair(0, (4, 4)), "down": nothing})
    assert controls(filled(LINEAR), INPUTS[LINEAR], given)[0].names == ("up",)


def test_a_large_graph_has_the_pairs_of_a_layer_off_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_controls, "LARGEST_EFFORT", 4)
    text = LINEAR.replace("up.weight", "h.0.up.weight").replace("down.weight", "h.0.down.weight")
    given = an_adapter({"h.0.up": a_pair(0, (4, 4)), "h.0.down": a_pair(1, (4, 4))})
    found, (outputs,) = controls(filled(text), INPUTS[LINEAR], given)
    assert found.names == ("h.0",) and found.by_layer
    base = run_in_fp64(filled(text), {"one": {"x": INPUTS[LINEAR]}}).by_case["one"]["y"]
    assert np.abs(outputs["y"] - base).max() < EXACT
