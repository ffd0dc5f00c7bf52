"""The weights of a graph, compared with those of the graph that it was made from, before anything is run.

What no adapter changes must be what it was. A weight into which adapters were merged must be W + s·BA, in the layout of
its initializer. Where a weight is in the graph, and to which readers it belongs, is known as the merge knows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import onnx_ir as ir

from lora_export.errors import InputRefused
from lora_export.graph.exporter_names import parameter_of
from lora_export.graph.find_sites import Sites
from lora_export.graph.merge.fold import InitializerChange, isolate_changes
from lora_export.graph.site import NameSource
from lora_export.graph.values import stored_dtype, stored_shape
from lora_export.plan import FLOATS, Plan, Step, TensorSpec
from lora_export.plan.stored_region import StoredRegion
from lora_export.verification.references.compare_tensors import (
    CandidateTensor,
    ComparedWeights,
    compare_expected,
    stored_floats,
    value_array,
)
from lora_export.verification.references.expected_weight import ExpectedWeight


def compare_initializers(
    candidate: ir.Model, base: ir.Model, sites: Sites, changes: Plan | None, *, merged: bool
) -> ComparedWeights:
    """Compare each float tensor of a candidate with that of its base, or with its sum with what adapters add to it.

    `base` is changed and of no further use. Without `merged`, pairs are beside the weights. Reads one tensor of each at
    a time.
    """
    by_name: dict[str, list[Step]] = {}
    left_out: set[str] = set()
    steps = changes.steps if changes is not None else ()
    for step in steps if merged else _without_pairs(steps):
        for site in sites.by_name[step.weight]:
            inputs = () if site.quantised is None else site.quantised.node.inputs
            left_out |= {str(value.name) for value in inputs if value is not None}  # outputs judge them
        with contextlib.suppress(InputRefused):
            for change in isolate_changes(base, sites, step):
                if stored_dtype(change.value) in FLOATS:
                    by_name.setdefault(str(change.value.name), []).append(_in_initializer(change))
    values = {str(value.name): value for value in stored_floats(base)}
    expected = {
        name: ExpectedWeight(_spec(value), value_array(value), tuple(by_name.get(name, ())))
        for name, value in values.items()
        if name not in left_out
    }
    weights = ((id(values[name]), weight) for name, weight in expected.items())
    return compare_expected(_tensors(candidate, set(expected)), weights, owner="the source graph")


def _without_pairs(steps: Iterable[Step]) -> Iterator[Step]:
    """What is merged where pairs are beside the weights: whole tensors, and changes of biases."""
    for step in steps:
        if not step.terms or step.replace is not None:
            yield replace(step, terms=())


def _in_initializer(change: InitializerChange) -> Step:
    """The step on the part of the initializer that is its weight."""
    if not change.is_block:
        return change.step
    name, shape = str(change.value.name), change.cut_shape or stored_shape(change.value)
    rows = change.patch(shape[-2] if change.cut_shape is None else shape[0])
    region = StoredRegion(name, (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape, rows.rows, rows.columns)
    return replace(change.step, spec=replace(change.step.spec, region=region))


def _spec(value: ir.Value) -> TensorSpec:
    return TensorSpec(str(value.name), stored_shape(value), stored_dtype(value))


def _tensors(candidate: ir.Model, expected: set[str]) -> Iterator[CandidateTensor]:
    """The float tensors of a candidate. Where it has all names of its base, each names the same tensor."""
    values = list(stored_floats(candidate))
    has_all = expected <= {str(value.name) for value in values}
    for value in values:
        name, source = (str(value.name), NameSource.INITIALIZER) if has_all else parameter_of(value)
        yield CandidateTensor(name, source, stored_shape(value), value_array(value))
