"""Tensors of its own for every quantised weight that changes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lora_export.errors import InputRefused
from lora_export.graph.merge.isolate import InitializerChange, isolate_value
from lora_export.graph.quantised.quantised_weights import DequantizeLinearWeight
from lora_export.graph.quantised.requantise import Component, RequantisedWeight
from lora_export.graph.quantised.scheme_of_weight import requantised_weight, stored_weight


def isolate_quantised(
    model: ir.Model, value: ir.Value, changes: Sequence[InitializerChange]
) -> tuple[RequantisedWeight, dict[Component, ir.Value]]:
    """The weight whose integers are `value`, and the values of its tensors that change.

    `merge.isolate.isolate_changes` has isolated the integers. Scales and zero points with other readers get new
    initializers. Copies no data. Raises InputRefused as `requantised_weight` does, and where the same integers are read
    with several scales.
    """
    readers = list(value.uses())
    stored = stored_weight(*readers[0])
    assert stored is not None
    positions = (0, 1, 2) if isinstance(stored, DequantizeLinearWeight) else (1, 2, 3)
    inputs = dict(zip(Component, positions, strict=True))
    name = value.name or "" if changes[0].is_block else changes[0].step.weight
    formats = {
        (type(stored_weight(node, index)), *node.inputs[inputs[Component.SCALES] : inputs[Component.ZEROS] + 1])
        for node, index in readers
    }
    if len(formats) > 1:
        raise InputRefused(
            f"{name}: its integers are read with several scales, and cannot be quantised again for one of them"
        )
    weight = requantised_weight(stored, [change.patch(stored.shape[0]) for change in changes], name)
    values = {Component.LEVELS: value}
    for component in weight.components[1:]:
        index = inputs[component]
        parameter = readers[0][0].inputs[index]
        assert parameter is not None
        component_inputs = [(node, index) for node, _ in readers]
        values[component] = isolate_value(model, parameter, component_inputs, f"{value.name}_{component}")
    return weight, values
