"""The input `adapter_strengths` of a graph: a factor of each adapter's change, which each run may choose."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lora_export.errors import InputRefused, count
from lora_export.formats.contract import ADAPTER_STRENGTHS, STRENGTHS_KEY
from lora_export.graph.insert.node_factory import Factor, NodeFactory, NodeList
from lora_export.graph.values import new_initializer
from lora_export.options.spelling import named
from lora_export.plan import Plan


class StrengthInput:
    """Multiplies factors of adapters by the graph's input, (adapters,) in fp32. Its default is ones.

    B is multiplied, of which every branch is a sum: so one factor reaches linear layers, convolutions, embeddings and
    weights that fused operators read alike. B is small beside its layer.
    """

    def __init__(self, model: ir.Model, factory: NodeFactory, adapters: Sequence[str]):
        """`adapters` are their names. Raises InputRefused for a graph that has an input or value of that name."""
        if ADAPTER_STRENGTHS in factory.value_names:
            raise InputRefused(f"the graph has {ADAPTER_STRENGTHS} already: start from the graph without adapters")
        self.model, self.factory, self.adapters = model, factory, list(adapters)
        factory.value_names.add(ADAPTER_STRENGTHS)
        self.value = new_initializer(model, ADAPTER_STRENGTHS, ir.Tensor(np.ones(len(adapters), np.float32)))
        model.graph.inputs.append(self.value)
        model.metadata_props[STRENGTHS_KEY] = json.dumps({"adapters": self.adapters})
        self._first = model.graph[0]  # what is computed of the input alone runs before it
        self._made: dict[tuple[int, ir.DataType], ir.Value] = {}

    def times(self, factor: Factor, adapter: str) -> Factor:
        """The factor times the strength of its adapter."""
        nodes = NodeList(self.factory, factor.path)
        value = nodes.add("Mul", [factor.value, self._of(adapter, factor)], factor.value.shape)
        return self._inserted(nodes, factor, value)

    def blended(self, factor: Factor, adapter: str) -> Factor:
        """1 + strength * (factor - 1): a factor that multiplies a layer, of which the change is the difference to 1.

        As strength * factor + (1 - strength), which has the bits of the factor at strength 1.
        """
        nodes = NodeList(self.factory, factor.path)
        shape, strength = factor.value.shape, self._of(adapter, factor)
        scaled = nodes.add("Mul", [factor.value, strength], shape)
        rest = nodes.add("Sub", [self._one(factor), strength], [1])
        return self._inserted(nodes, factor, nodes.add("Add", [scaled, rest], shape))

    def _of(self, adapter: str, factor: Factor) -> ir.Value:
        """The strength of an adapter in the factor's dtype, (1,)."""
        dtype = factor.value.dtype
        assert dtype is not None
        key = self.adapters.index(adapter), dtype
        if key not in self._made:
            nodes = NodeList(self.factory, f"/{ADAPTER_STRENGTHS}")
            place = self.factory.constant(nodes.path, "place", np.array([key[0]], np.int64))
            self._made[key] = nodes.cast(nodes.add("Gather", [self.value, place], [1], axis=0), dtype)
            self._insert(nodes)
        return self._made[key]

    def _one(self, factor: Factor) -> ir.Value:
        assert factor.value.dtype is not None
        return self.factory.constant(factor.path, "one", np.ones(1, factor.value.dtype.numpy()))

    def _inserted(self, nodes: NodeList, factor: Factor, value: ir.Value) -> Factor:
        self._insert(nodes)
        return factor._replace(value=value)

    def _insert(self, nodes: NodeList) -> None:
        self.model.graph.insert_before(self._first, nodes.nodes)


def refuse_steps_without_strength(plan: Plan) -> None:
    """Raise InputRefused for changes that no factor at run time scales, and where no change has one."""
    for reason, weights in (
        ("DoRA's lengths are computed for one strength", [step.weight for step in plan.steps if step.has_dora]),
        (
            "the change of a bias or a vector is merged",
            [step.weight for step in plan.steps if step.shift is not None or (step.is_vector and step.terms)],
        ),
    ):
        if weights:
            raise refused_strength(reason, weights)
    if plan.steps and not plan.low_rank:
        raise InputRefused(
            f"{plan.steps[0].weight}: every change is a tensor that is replaced whole, which has no strength. "
            f"Leave out {named('strength_input')}"
        )


def refused_strength(reason: str, weights: Sequence[str]) -> InputRefused:
    """The refusal of a strength at run time for changes of these weights."""
    more = f" and {count(len(weights) - 1, 'more weight')}" if len(weights) > 1 else ""
    return InputRefused(
        f"{reason}: {weights[0]}{more}. Leave out {named('strength_input')}, and make a graph for each strength "
        f"({named('weights')})"
    )
