"""The control of every pair of a graph: a candidate that lacks one pair of the adapters must be detected.

The base graph computes W + ΔW at each weight, in fp64. The tensors of the pairs are inputs of this graph, so that one
session runs with and without each pair. What is judged then is in pair_controls.py and parity/judging.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lora_export.graph.find_sites import Sites
from lora_export.graph.site import Site
from lora_export.plan import Layout, Plan, Step, Term
from lora_export.runtime.runner import TIMEOUT, Arrays
from lora_export.verification import parity
from lora_export.verification.pair_controls import (
    JudgeWithout,
    PairControls,
    grouped,
    switch_off,
    too_many,
    with_difference,
)
from lora_export.verification.parity import Wide
from lora_export.verification.references.base_graph import open_in_fp64
from lora_export.verification.references.graph_with_adapter import RecordedConstant, sum_at_weights


class GraphPair(NamedTuple):
    """One pair at one weight."""

    step: Step
    number: int  # of its term


def control_graph_pairs(
    model: ir.Model,
    sites: Sites,
    plan: Plan,
    inputs: Mapping[str, Arrays],
    cases: Sequence[parity.Case],
    judge: JudgeWithout,
    *,
    timeout: float = TIMEOUT,
) -> PairControls:
    """Switch off the pairs of a plan in a copy of the base graph, and `judge` the outputs.

    `inputs` are by the name of the case. `model` is changed and of no further use. A run of all cases and pairs takes
    as long as the reference in fp64, for each pair that the smallest case does not show as often as there are cases.
    """
    pairs = [
        (term.module, term.adapter, GraphPair(step, number))
        for step in plan.steps
        for number, term in enumerate(step.terms)
        if _has_effect(term)
    ]
    tensors = [value.const_value for value in model.graph.initializers.values()]
    by_layer = too_many(len(pairs), sum(tensor.size for tensor in tensors if tensor is not None))
    norms = {site: _norms(site) for step in plan.steps if step.has_dora for site in sites.by_name[step.weight]}
    constants: list[RecordedConstant] = []
    sum_at_weights(model, sites, plan, record=constants)
    for constant in constants:
        _make_input(model, constant.value)
    everything = {str(constant.value.name): np.ascontiguousarray(constant.array) for constant in constants}
    runner, _ = open_in_fp64(model, parts=[constant.value for constant in constants], timeout=timeout)

    def run_without(groups: Mapping[str, Sequence[GraphPair]], case: parity.Case) -> Iterator[tuple[str, Arrays]]:
        given = {**inputs[case.name], **everything}
        with_all = runner.run(given)
        for name, off in groups.items():
            yield name, with_difference(case, runner.run(given | _changed(off, constants, norms)), with_all)

    ordered = sorted(cases, key=lambda case: sum(array.size for array in inputs[case.name].values()))
    return switch_off(grouped(pairs, by_layer=by_layer), ordered, run_without, judge, by_layer=by_layer)


def _has_effect(term: Term) -> bool:
    """Whether a pair's product is not zero: whether a pair of zeros is there makes no difference."""
    pair = term.pair
    return pair.depends_on_weight or bool(term.scale and pair.a.any() and pair.b.any())


def _make_input(model: ir.Model, value: ir.Value) -> None:
    """Turn an initializer into an input of the graph, of the same type and shape."""
    del model.graph.initializers[str(value.name)]
    assert value.const_value is not None
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(value.const_value.shape.numpy())
    value.const_value = None
    model.graph.inputs.append(value)


def _changed(off: Sequence[GraphPair], constants: Sequence[RecordedConstant], norms: Mapping[Site, Wide]) -> Arrays:
    """The tensors of the pairs that are off: B without their ranks, and for DoRA the length of each row of W."""
    changed: Arrays = {}
    for constant in constants:
        numbers = [pair.number for pair in off if pair.step is constant.step]
        if not numbers or constant.part == "A":
            continue
        array = np.ascontiguousarray(constant.array).copy()
        if constant.base is not None:
            array = constant.base
        elif constant.part == "magnitude":
            block = constant.site.block
            array.reshape(-1)[slice(None) if block is None else slice(block.start, block.stop)] = norms[constant.site]
        else:
            ranks = np.cumsum([0, *(term.pair.rank for term in constant.step.terms)])
            by_rank = array if constant.is_transposed else array.T  # (ranks, out)
            for number in numbers:
                by_rank[ranks[number] : ranks[number + 1]] = 0
        changed[str(constant.value.name)] = array
    return changed


def _norms(site: Site) -> Wide:
    """The length of each row of a weight (out, in * kernel), in fp64."""
    array = site.array.T if site.layout is Layout.EMBEDDING else site.array if site.is_convolution else site.matrix
    norms: Wide = np.linalg.norm(array.reshape(len(array), -1).astype(np.float64), axis=1)
    return norms
