"""A plan into a graph's weights: W' = W + ΔW, in place of W."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.graph.readers import Site, readers, tensor_of
from lora_export.graph.sites import FOLDED_FROM, Sites, unused, value_names
from lora_export.plan import Layout, Plan, Step
from lora_export.weights.merge_report import Statistics, StepResult


@dataclass(frozen=True, eq=False)
class Landing:
    """One initializer that changes, and its step, said of the initializer as it lies there."""

    value: ir.Value
    step: Step
    where: tuple[slice, ...] = (slice(None),)  # what of it is the weight's; the rest is others', side by side with it

    @property
    def is_block(self) -> bool:
        return self.where != (slice(None),)


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
    rows = [step.weight for step in plan.steps if step.token_rows is not None]
    if rows:
        raise InputRefused(
            f"{', '.join(rows)}: rows of tokens cannot be put into a graph, where input and output may share them. "
            "Merge the adapter into the model's checkpoint, and export that"
        )


def refuse_what_no_branch_can_do(plan: Plan) -> None:
    """Raise InputRefused for what can be folded into a graph's weights and not stand beside them."""
    refuse_what_a_graph_cannot_take(plan)
    for step in plan.low_rank:
        if step.replace is not None:
            raise InputRefused(
                f"{step.terms[0].adapter}: {step.weight}: a pair on a tensor that its adapter brings cannot stand "
                "beside a graph's weights yet. Merge it into them"
            )


def refuse_quantised(step: Step, sites: Sites) -> None:
    """Raise InputRefused where a weight is held as integers and scales: W + ΔW would have to be quantised anew."""
    kinds = {site.quantised.kind for site in sites.by_name[step.weight] if site.quantised is not None}
    if kinds:
        raise InputRefused(
            f"{step.weight} is quantised ({', '.join(sorted(kinds))}): its weights are never quantised again silently. "
            "Keep the adapter beside it (onnx MODEL.onnx --lora nodes), as one that was trained on a quantised base "
            "wants it; or quantise it again with the change in it (merge --requantize), which rounds the change too; "
            "or merge into the float model, and quantise that"
        )


def change_weight(model: ir.Model, sites: Sites, step: Step) -> StepResult | None:
    """Carry out one step on every initializer that holds its weight; None where a whole tensor takes its place."""
    refuse_quantised(step, sites)
    statistics = Statistics(step.weight)
    for landing in land(model, sites, step):
        statistics.merge(change_in_memory(landing))
    return None if step.is_replacement else statistics.result()


def change_in_memory(landing: Landing) -> Statistics:
    """Carry out a landing; what was counted is empty where a whole tensor came. Raises InputRefused as `fold` does."""
    tensor, step = landing.value.const_value, landing.step
    assert tensor is not None
    before, statistics = tensor.numpy()[landing.where], Statistics(step.weight)
    turned = step.spec.layout.is_transposed
    start = before if step.replace is None else step.replace
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        if step.is_replacement:
            after = start.astype(before.dtype)
        else:
            view = start.T if turned else start  # (out, in, ...)
            total, change = sums.summed(step, view)
            after = total.astype(before.dtype)
            statistics.add_block(view, change, after)
            after = after.T if turned else after
    refuse_overflow(step.weight, after, before=before)
    if landing.is_block:  # its neighbours keep their bytes
        whole = tensor.numpy().copy()
        whole[landing.where] = after
        after = whole
    landing.value.const_value = ir.Tensor(np.ascontiguousarray(after), name=landing.value.name)
    return statistics


def land(model: ir.Model, sites: Sites, step: Step) -> list[Landing]:
    """Find the initializers that a step changes, each read by nobody else from now on: what shared it is given one.

    No data is read or copied; an initializer that is new holds the old one's tensor. What stands between an
    initializer and its reader (a Transpose, a Cast) still does.
    """
    by_value: dict[tuple[ir.Value, range | None], list[Site]] = {}
    for site in sorted(sites.by_name[step.weight], key=lambda site: not site.is_linear):
        # A linear reader comes first: it tells how the matrix lies.
        by_value.setdefault((site.value, site.block), []).append(site)
    return [
        Landing(_own_value(model, sites, value, there, step), _as_stored(step, there[0]), there[0].where)
        for (value, _), there in by_value.items()
    ]


def _as_stored(step: Step, site: Site) -> Step:
    """A step as it is to be done to an initializer that lies as this reader says."""
    spec = step.spec
    lies = spec.layout if site.layout is Layout.OTHER else site.layout
    turned = lies.is_transposed != spec.layout.is_transposed
    dtype = site.dtype if site.quantised is not None else str(site.tensor.dtype.numpy())
    stored = replace(spec, shape=site.shape, dtype=dtype, layout=lies)
    whole = step.replace.T if step.replace is not None and turned else step.replace
    return replace(step, spec=stored, replace=whole)


def _own_value(model: ir.Model, sites: Sites, value: ir.Value, mine: Sequence[Site], step: Step) -> ir.Value:
    """The initializer that these readers, and no others, read from now on."""
    places = {site.place for site in mine}
    others = [site for site in readers(value) if site.place not in places]
    tensor = tensor_of(value)
    if tensor is None or (not others and value.is_initializer() and not value.is_graph_output()):
        return value
    if mine[0].block is not None:
        reader = others[0].node.op_type if others else "a Constant node or an output"
        raise InputRefused(
            f"{step.weight} is a block of {value.name}, which is also {reader}'s: it cannot change for one alone"
        )
    taken = value_names(model)
    if value.name == step.weight:  # the name goes with the weight that it stands for
        value.name = unused(next((sites.name_of(site) for site in others), "") or f"{step.weight}.shared", taken)
        taken.remove(step.weight)
    own = new_initializer(model, unused(step.weight, taken), tensor)
    if mine[0].layout is Layout.IN_OUT and step.spec.layout is Layout.OUT_IN:
        own.metadata_props[FOLDED_FROM] = repr([step.weight])
    for site in mine:
        site.node.replace_input_with(site.index, _behind(model, site, own))
    _drop_idle(value)
    return own


def alone(model: ir.Model, value: ir.Value, readers: Sequence[tuple[ir.Node, int]], name: str) -> ir.Value:
    """The initializer that these inputs of nodes, and no others, read from now on: `value`, or a new one like it."""
    tensor = tensor_of(value)
    assert tensor is not None
    if value.is_initializer() and not value.is_graph_output() and set(value.uses()) <= set(readers):
        return value
    own = new_initializer(model, unused(name, value_names(model)), tensor)
    for node, index in readers:
        node.replace_input_with(index, own)
    _drop_idle(value)
    return own


def _behind(model: ir.Model, site: Site, own: ir.Value) -> ir.Value:
    """`own` behind nodes like those that stand between the site's value and its reader."""
    between: list[ir.Node] = []
    at = site.node.inputs[site.index]
    while at is not site.value:
        assert at is not None
        node = at.producer()
        assert node is not None
        between.append(node)
        at = node.inputs[0]
    reader, last = site.node.graph, own
    assert reader is not None
    taken = value_names(model)
    for node in reversed(between):
        name, old = unused(f"{own.name}_{node.op_type}", taken), node.outputs[0]
        output = ir.Value(name=name, type=old.type, shape=old.shape)
        inputs = [last, *node.inputs[1:]]  # a DequantizeLinear has scales
        copy = ir.node(node.op_type, inputs, node.attributes, domain=node.domain, outputs=[output], name=name)
        reader.insert_before(site.node, copy)
        last = output
    return last


def _drop_idle(value: ir.Value) -> None:
    """Remove what only led from the weight to its former readers."""
    for node, _ in list(value.uses()):
        if node.op_type in ("Transpose", "Cast", "Identity", "DequantizeLinear"):
            _drop_idle(node.outputs[0])
            _remove_idle(node)
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant":
        _remove_idle(producer)


def _remove_idle(node: ir.Node) -> None:
    idle = not any(output.uses() or output.is_graph_output() for output in node.outputs)
    if idle and node.graph is not None:
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
