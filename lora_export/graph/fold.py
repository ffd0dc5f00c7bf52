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
from lora_export.plan import Layout, Plan, Step


def fold(model: ir.Model, sites: Sites, plan: Plan) -> list[StepResult]:
    """Carry out a plan on the weights of a graph, in memory. Returns what became of each changed weight.

    ΔW and the sum in fp32, one rounding to the initializer's dtype. Only the plan's weights change: a
    reader that shared its tensor with others (tied or equal weights) gets an initializer of its own,
    and every other initializer keeps its bytes. `sites` does not describe the graph any more then.

    Raises InputRefused where a result is not finite; throw the graph away then, it is half folded.
    """
    refuse_what_a_graph_cannot_take(plan)
    return [result for step in plan.steps if (result := change_weight(model, sites, step)) is not None]


def refuse_what_a_graph_cannot_take(plan: Plan) -> None:
    """Raise InputRefused for steps that no graph can carry out."""
    added = [step.weight for step in plan.steps if step.added]
    if added:
        raise InputRefused(f"the graph has no {', '.join(added)}: export the model with the head of the adapter")
    rows = [step.weight for step in plan.steps if step.rows is not None]
    if rows:
        raise InputRefused(
            f"{', '.join(rows)}: rows of tokens cannot be put into a graph, where input and output may share them. "
            "Merge the adapter into the model's checkpoint, and export that"
        )


def refuse_what_no_branch_can_do(plan: Plan) -> None:
    """Raise InputRefused for pairs that can be folded into a graph's weights and not yet stand beside them."""
    refuse_what_a_graph_cannot_take(plan)
    for step in plan.steps:
        for term in step.terms:
            if term.pair.magnitude is not None:
                what = "DoRA"
            elif term.pair.embedding:
                what = "an adapter of an embedding"
            elif term.pair.a.ndim > 2:
                what = "an adapter of a convolution"
            elif step.replace is not None:
                what = "a pair on a tensor that its adapter brings"
            else:
                continue
            raise InputRefused(
                f"{term.adapter}: {step.weight}: {what} cannot stand beside a graph's weights yet. Merge it into them"
            )


def change_weight(model: ir.Model, sites: Sites, step: Step) -> StepResult | None:
    """Carry out one step on every initializer that holds its weight; None where a whole tensor takes its place."""
    by_value: dict[ir.Value, list[Site]] = {}
    for site in sorted(sites.by_name[step.weight], key=lambda site: not site.is_linear):
        by_value.setdefault(site.value, []).append(site)  # a linear reader comes first: it tells how the matrix lies
    tally = Tally(step.weight)
    for value, there in by_value.items():
        before, layout = there[0].array, there[0].layout
        turned = layout not in (step.spec.layout, Layout.OTHER)
        start = before if step.replace is None else step.replace.T if turned else step.replace
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            if step.is_whole:
                after = start.astype(before.dtype)
            else:
                after = _carried_out(step, start, before.dtype, layout, tally)
        refuse_overflow(step.weight, after, before=before)
        _store(model, sites, value, there, step, np.ascontiguousarray(after))
    return None if step.is_whole else tally.result()


def _carried_out(step: Step, start: NDArray[Any], dtype: np.dtype[Any], layout: Layout, tally: Tally) -> NDArray[Any]:
    """W' in the dtype and the layout of its initializer."""
    lies = step.spec.layout if layout is Layout.OTHER else layout
    view = start.T if lies.is_turned else start  # (out, in, ...)
    total, change = step.carried_out(view)
    after = total.astype(dtype)
    tally.count(view, change, after)
    return after.T if lies.is_turned else after


def _store(
    model: ir.Model, sites: Sites, value: ir.Value, mine: Sequence[Site], step: Step, array: NDArray[Any]
) -> None:
    """Let these readers, and no others, read the array from now on."""
    places = {site.place for site in mine}
    others = [site for site in readers(value) if site.place not in places]
    if not others and not value.is_graph_output():
        value.const_value = ir.Tensor(array, name=value.name)
        return
    taken = value_names(model)
    if value.name == step.weight:  # the name goes with the weight that it stands for
        value.name = unused(next((sites.name_of(site) for site in others), "") or f"{step.weight}.shared", taken)
        taken.remove(step.weight)
    for turned in sorted({site.turned for site in mine}):
        # The new initializer is read directly: what a Transpose did is done here.
        own = new_initializer(model, unused(step.weight, taken), array.T.copy() if turned else array)
        for site in mine:
            if site.turned is turned:
                site.node.replace_input_with(site.index, own)
        lies = flipped(mine[0].layout) if turned else mine[0].layout
        if lies is Layout.IN_OUT and step.spec.layout is Layout.OUT_IN:
            own.metadata_props[FOLDED_FROM] = repr([step.weight])
    _drop_idle_transposes(value)


def _drop_idle_transposes(value: ir.Value) -> None:
    for node, _ in list(value.uses()):
        idle = not any(output.uses() or output.is_graph_output() for output in node.outputs)
        if node.op_type == "Transpose" and idle and node.graph is not None:
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
