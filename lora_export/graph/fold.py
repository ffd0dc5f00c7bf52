"""A plan into a graph's weights: W' = W + ΔW, in place of W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.sites import FOLDED_FROM, Site, Sites, flipped, readers, unused, value_names
from lora_export.ledger import StepResult, Tally
from lora_export.lora import add
from lora_export.plan import Layout, Plan, Step


def fold(model: ir.Model, sites: Sites, plan: Plan) -> list[StepResult]:
    """Carry out a plan on the weights of a graph, in memory. Returns what became of each changed weight.

    ΔW and the sum in fp32, one rounding to the initializer's dtype. Only the plan's weights change: a
    reader that shared its tensor with others (tied or equal weights) gets an initializer of its own,
    and every other initializer keeps its bytes. `sites` does not describe the graph any more then.

    Raises InputRefused where a result is not finite; throw the graph away then, it is half folded.
    """
    refuse_what_a_graph_cannot_take(plan)
    for step in plan.steps:
        refuse_quantised(step, sites)
    return [result for step in plan.steps if (result := change_weight(model, sites, step)) is not None]


def refuse_what_a_graph_cannot_take(plan: Plan) -> None:
    """Raise InputRefused for steps that no graph can carry out."""
    added = [step.weight for step in plan.steps if step.added]
    if added:
        raise InputRefused(f"the graph has no {', '.join(added)}: export the model with the head of the adapter")
    scaled = {term.adapter for step in plan.steps for term in step.terms if term.pair.magnitude is not None}
    if scaled:
        raise InputRefused(f"{', '.join(sorted(scaled))}: DoRA is not supported in a graph yet")


def refuse_quantised(step: Step, sites: Sites) -> None:
    """Raise InputRefused where a weight is held as integers and scales: W + ΔW would have to be quantised anew."""
    kinds = {site.quantised.kind for site in sites.by_name[step.weight] if site.quantised is not None}
    if kinds:
        raise InputRefused(
            f"{step.weight} is quantised ({', '.join(sorted(kinds))}): its weights are never quantised again silently. "
            "Keep the adapter beside it (--lora nodes), as one that was trained on a quantised base wants it; or merge "
            "into the float model, and quantise that"
        )


def change_weight(model: ir.Model, sites: Sites, step: Step) -> StepResult | None:
    """Carry out one step on every initializer that holds its weight; None where a whole tensor takes its place."""
    refuse_quantised(step, sites)
    by_value: dict[tuple[ir.Value, range | None], list[Site]] = {}
    for site in sorted(sites.by_name[step.weight], key=lambda site: not site.is_linear):
        # A linear reader comes first: it tells how the matrix lies.
        by_value.setdefault((site.value, site.block), []).append(site)
    tally = Tally(step.weight)
    for (value, block), there in by_value.items():
        before, layout = there[0].array, there[0].layout
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            if step.replace is not None:
                turned = layout not in (step.spec.layout, Layout.OTHER)
                after = (step.replace.T if turned else step.replace).astype(before.dtype)
            else:
                change = step.delta().T if layout is Layout.IN_OUT else step.delta()
                after = add(before, change)
                tally.count(before, change, after)
        refuse_overflow(step.weight, after, before=before)
        if block is not None:  # its neighbours keep their bytes
            whole = there[0].stored.copy()
            whole[there[0].where] = after
            after = whole
        _store(model, sites, value, there, step, np.ascontiguousarray(after))
    return tally.result() if step.replace is None else None


def _store(
    model: ir.Model, sites: Sites, value: ir.Value, mine: Sequence[Site], step: Step, array: NDArray[Any]
) -> None:
    """Let these readers, and no others, read the array from now on."""
    places = {site.place for site in mine}
    others = [site for site in readers(value) if site.place not in places]
    if not others and value.is_initializer() and not value.is_graph_output():
        value.const_value = ir.Tensor(array, name=value.name)
        return
    if mine[0].block is not None:
        reader = others[0].node.op_type if others else "a Constant node or an output"
        raise InputRefused(
            f"{step.weight} is a block of {value.name}, which is also {reader}'s: it cannot change for one alone"
        )
    taken = value_names(model)
    if value.name == step.weight:  # the name goes with the weight that it stands for
        value.name = unused(next((sites.name_of(site) for site in others), "") or f"{step.weight}.shared", taken)
        taken.remove(step.weight)
    for turned, dtype in sorted({(site.turned, site.dtype) for site in mine}):
        # The new initializer is read directly: what a Transpose or a Cast did is done here.
        seen = (array.T.copy() if turned else array).astype(np.dtype(dtype), copy=False)
        own = new_initializer(model, unused(step.weight, taken), seen)
        for site in mine:
            if (site.turned, site.dtype) == (turned, dtype):
                site.node.replace_input_with(site.index, own)
        lies = flipped(mine[0].layout) if turned else mine[0].layout
        if lies is Layout.IN_OUT and step.spec.layout is Layout.OUT_IN:
            own.metadata_props[FOLDED_FROM] = repr([step.weight])
    _drop_idle(value)


def _drop_idle(value: ir.Value) -> None:
    """Remove what only led from the weight to its former readers."""
    for node, _ in list(value.uses()):
        if node.op_type in ("Transpose", "Cast", "Identity"):
            _drop_idle(node.outputs[0])
            _remove_idle(node)
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant":
        _remove_idle(producer)


def _remove_idle(node: ir.Node) -> None:
    idle = not any(output.uses() or output.is_graph_output() for output in node.outputs)
    if idle and node.graph is not None:
        node.graph.remove(node, safe=True)


def new_initializer(model: ir.Model, name: str, array: NDArray[Any]) -> ir.Value:
    """Register an initializer with the main graph, where every subgraph sees it."""
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    model.graph.register_initializer(value)
    return value


def refuse_overflow(weight: str, after: NDArray[Any], *, before: NDArray[Any] | None = None) -> None:
    """Raise InputRefused where a result is not finite, saying whether it was so before."""
    bad = after.size - np.count_nonzero(np.isfinite(after))
    if not bad:
        return
    if before is not None and not np.isfinite(before).all():
        why = "the graph's own tensor has such values"
    else:
        limit = float(ml_dtypes.finfo(after.dtype).max)
        why = f"the largest {after.dtype} is {limit:g}; look at the adapter's scale, or export in float32"
    raise InputRefused(f"{weight}: {bad} values would not be finite: {why}. Nothing was written.")
