"""A plan into a graph's weights: W' = W + ΔW, in place of W."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.sites import FOLDED_FROM, Site, Sites, readers, unused, value_names
from lora_export.ledger import StepResult, Tally
from lora_export.plan import Layout, Plan, Step


@dataclass(frozen=True, eq=False)
class Landing:
    """One initializer that changes, and its step, said of the initializer as it lies there."""

    value: ir.Value
    step: Step


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
    tally = Tally(step.weight)
    for landing in land(model, sites, step):
        tally.merge(change_in_memory(landing))
    return None if step.is_whole else tally.result()


def change_in_memory(landing: Landing) -> Tally:
    """Carry out a landing; what was counted is empty where a whole tensor came. Raises InputRefused as `fold` does."""
    tensor, step = landing.value.const_value, landing.step
    assert tensor is not None
    before, tally = tensor.numpy(), Tally(step.weight)
    turned = step.spec.layout.is_turned
    start = before if step.replace is None else step.replace
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        if step.is_whole:
            after = start.astype(before.dtype)
        else:
            view = start.T if turned else start  # (out, in, ...)
            total, change = step.carried_out(view)
            after = total.astype(before.dtype)
            tally.count(view, change, after)
            after = after.T if turned else after
    refuse_overflow(step.weight, after, before=before)
    landing.value.const_value = ir.Tensor(np.ascontiguousarray(after), name=landing.value.name)
    return tally


def land(model: ir.Model, sites: Sites, step: Step) -> list[Landing]:
    """Find the initializers that a step changes, each read by nobody else from now on: what shared it is given one.

    No data is read or copied; an initializer that is new holds the old one's tensor. Where a Transpose stands between
    an initializer and its reader, it still does.
    """
    by_value: dict[ir.Value, list[Site]] = {}
    for site in sorted(sites.by_name[step.weight], key=lambda site: not site.is_linear):
        by_value.setdefault(site.value, []).append(site)  # a linear reader comes first: it tells how the matrix lies
    return [
        Landing(_own_value(model, sites, value, there, step), _as_stored(step, value, there[0].layout))
        for value, there in by_value.items()
    ]


def _as_stored(step: Step, value: ir.Value, layout: Layout) -> Step:
    """A step as it is to be done to an initializer that lies in this way."""
    tensor, spec = value.const_value, step.spec
    assert tensor is not None
    lies = spec.layout if layout is Layout.OTHER else layout
    turned = lies.is_turned != spec.layout.is_turned
    shape = tuple(int(size) for size in tensor.shape.numpy())
    stored = replace(spec, shape=shape, dtype=str(tensor.dtype.numpy()), layout=lies, nbytes=tensor.nbytes)
    whole = step.replace.T if step.replace is not None and turned else step.replace
    return replace(step, spec=stored, replace=whole)


def _own_value(model: ir.Model, sites: Sites, value: ir.Value, mine: Sequence[Site], step: Step) -> ir.Value:
    """The initializer that these readers, and no others, read from now on."""
    places = {site.place for site in mine}
    others = [site for site in readers(value) if site.place not in places]
    tensor = value.const_value
    if tensor is None or (not others and not value.is_graph_output()):
        return value
    taken = value_names(model)
    if value.name == step.weight:  # the name goes with the weight that it stands for
        value.name = unused(next((sites.name_of(site) for site in others), "") or f"{step.weight}.shared", taken)
        taken.remove(step.weight)
    own = new_initializer(model, unused(step.weight, taken), tensor)
    if mine[0].layout is Layout.IN_OUT and step.spec.layout is Layout.OUT_IN:
        own.metadata_props[FOLDED_FROM] = repr([step.weight])
    for site in mine:
        site.node.replace_input_with(site.index, _turned(model, site, own) if site.turned else own)
    _drop_idle_transposes(value)
    return own


def _turned(model: ir.Model, site: Site, own: ir.Value) -> ir.Value:
    """`own` behind a Transpose like the one that stands before the site's reader."""
    before = site.node.inputs[site.index]
    assert before is not None
    old, graph = before.producer(), site.node.graph
    assert old is not None and graph is not None
    name = unused(f"{own.name}_turned", value_names(model))
    shape = own.shape and ir.Shape([*own.shape][::-1])
    turn = ir.node(
        "Transpose", [own], old.attributes, outputs=[ir.Value(name=name, type=own.type, shape=shape)], name=name
    )
    graph.insert_before(site.node, turn)
    return turn.outputs[0]


def _drop_idle_transposes(value: ir.Value) -> None:
    for node, _ in list(value.uses()):
        idle = not any(output.uses() or output.is_graph_output() for output in node.outputs)
        if node.op_type == "Transpose" and idle and node.graph is not None:
            node.graph.remove(node, safe=True)


def new_initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register an initializer with the main graph, where every subgraph sees it."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
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
