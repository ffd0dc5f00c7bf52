"""Merging a plan into a graph's weights in memory: W' = W + ΔW, in place of W.

Readers of tied or equal weights share one initializer. A reader whose weight changes gets a new one, so that all other
readers keep theirs; readers that get the same rows keep one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.graph.exporter_names import FOLDED_FROM
from lora_export.graph.find_sites import Sites
from lora_export.graph.refusals import refuse_not_finite, refuse_quantised, refuse_unsupported_steps
from lora_export.graph.site import NameSource, Site, find_readers
from lora_export.graph.values import new_initializer, tensor_of, unused_name, value_names
from lora_export.lora import EVERY_ROW
from lora_export.plan import Layout, Plan, Step, StoredRegion
from lora_export.weights.merge_report import Statistics, StepResult
from lora_export.weights.tensor_blocks import Patch


@dataclass(frozen=True, eq=False)
class InitializerChange:
    """One initializer that changes, and the step in the shape and layout in which the initializer is stored."""

    value: ir.Value
    step: Step
    slices: tuple[slice, ...] = (slice(None),)  # the weight's part of the matrix; the rest are its neighbours
    expert: int | None = None  # the matrix, where the initializer stacks those of experts
    cut_shape: tuple[int, ...] | None = None  # in which the initializer is indexed; None: its own
    is_turned: bool = False  # whether the weight is its transpose

    @property
    def entries(self) -> tuple[slice | int, ...]:
        """The weight's entries in the initializer, as indices."""
        return self.slices if self.expert is None else (self.expert, *self.slices)

    def indexed(self, array: NDArray[Any]) -> NDArray[Any]:
        """A view of the initializer's array in the shape that `entries` are indices of."""
        return array if self.cut_shape is None else array.reshape(self.cut_shape)

    @property
    def is_block(self) -> bool:
        """Whether the initializer holds other weights too."""
        return self.expert is not None or self.cut_shape is not None or self.slices != (slice(None),)

    def patch(self, rows: int) -> Patch:
        """The change as a patch of a matrix with this number of rows, or of such matrices one below the other."""
        own_rows, *columns = self.slices
        first, last, _ = own_rows.indices(rows)
        above = (self.expert or 0) * rows
        return Patch(self.step, slice(above + first, above + last), columns[0] if columns else EVERY_ROW)


def with_readers_alike(sites: Sites, steps: Iterable[Step]) -> list[tuple[Step, list[Site]]]:
    """Each step with the readers of other weights that get the same rows of the same initializer, as of a tied table.

    Such steps are one here, the first of them: the initializer changes once.
    """
    found: list[tuple[Step, list[Site]]] = []
    for step in steps:
        others = found if step.replaces_only_rows else ()
        first = next((alike for other, alike in others if _replace_one_table(step, other, sites)), None)
        if first is None:
            found.append((step, []))
        else:
            first.extend(sites.by_name[step.weight])
    return found


def _replace_one_table(step: Step, other: Step, sites: Sites) -> bool:
    """Whether two steps replace the same rows of the one initializer that the readers of both read."""
    if not other.replaces_only_rows:
        return False
    readers = [(each, site) for each in (step, other) for site in sites.by_name[each.weight]]
    value = readers[0][1].value
    rows = [as_stored(each, site).token_rows for each, site in readers]
    return all(site.value is value and site.block is None and site.expert is None for _, site in readers) and all(
        rows[0] is not None and one is not None and rows[0].equals(one) and rows[0].is_transposed is one.is_transposed
        for one in rows
    )


def isolate_changes(model: ir.Model, sites: Sites, step: Step, alike: Sequence[Site] = ()) -> list[InitializerChange]:
    """Find the initializers that a step changes, and give each of them to the step's readers and those `alike`.

    Reads and copies no data: a new initializer holds the old one's tensor. Nodes between an initializer and its reader
    (Transpose, Cast) are copied. Raises InputRefused for a block of a packed initializer that has other readers.
    """
    if step.spec.region is not None:
        return _isolate_region(sites, step, step.spec.region)
    by_initializer: dict[tuple[ir.Value, int | None, range | None], list[Site]] = {}
    for site in sorted(sites.by_name[step.weight], key=lambda site: not site.is_linear):
        # A linear reader comes first, because it determines the layout.
        by_initializer.setdefault((site.value, site.expert, site.block), []).append(site)
    return [
        InitializerChange(
            _isolate_weight(model, sites, value, readers, step, alike),
            as_stored(step, readers[0]),
            readers[0].block_slices,
            expert,
            is_turned=readers[0].layout is Layout.IN_OUT and step.spec.layout is Layout.OUT_IN,
        )
        for (value, expert, _), readers in by_initializer.items()
    ]


def _isolate_region(sites: Sites, step: Step, region: StoredRegion) -> list[InitializerChange]:
    """The change of a part of a stacked weight, such as an expert, whatever nodes read the weight.

    Raises InputRefused where the initializer may not be the model's parameter as it was, or holds other weights too.
    """
    values = {site.value: site for site in sites.by_name[region.tensor]}
    for value, site in values.items():
        inputs = {other.node_input for other in sites.by_name[region.tensor]}
        is_changed = FOLDED_FROM in value.metadata_props or site.named_by is not NameSource.INITIALIZER
        others = [other.node.op_type for other in find_readers(value) if other.node_input not in inputs]
        if is_changed or others or site.block is not None or not isinstance(value.const_value, ir.TensorProtocol):
            why = f"{others[0]} reads it as another weight" if others else "the exporter changed it"
            raise InputRefused(f"{step.weight} is a part of {value.name}, and {why}: it cannot be merged there")
    return [
        InitializerChange(
            value,
            replace(step, spec=replace(step.spec, dtype=str(site.tensor.dtype.numpy()))),
            (region.rows, region.columns),
            cut_shape=region.shape,
        )
        for value, site in values.items()
    ]


def as_stored(step: Step, site: Site) -> Step:
    """The step in the shape and layout of the initializer that this site reads."""
    spec = step.spec
    layout = spec.layout if site.layout is Layout.OTHER else site.layout
    is_transposed = layout.is_transposed != spec.layout.is_transposed
    dtype = site.dtype if site.quantised is not None else str(site.tensor.dtype.numpy())
    stored = replace(spec, shape=site.shape, dtype=dtype, layout=layout)
    if not is_transposed:
        return replace(step, spec=stored)
    whole = None if step.replace is None else step.replace.T
    rows = None if step.token_rows is None else step.token_rows.transposed
    return replace(step, spec=stored, replace=whole, token_rows=rows)


def _isolate_weight(
    model: ir.Model, sites: Sites, value: ir.Value, readers: Sequence[Site], step: Step, alike: Sequence[Site]
) -> ir.Value:
    """The initializer that only these readers of the step's weight read, and those alike: `value`, or a new one."""
    readers = [*readers, *(site for site in alike if site.node_input not in {each.node_input for each in readers})]
    inputs = {site.node_input for site in readers}
    expert = readers[0].expert
    others = [
        site
        for site in find_readers(value)
        if site.node_input not in inputs and (expert is None or site.expert in (None, expert))
    ]
    tensor = tensor_of(value)
    if tensor is None or (not others and value.is_initializer() and not value.is_graph_output()):
        return value
    if readers[0].block is not None or expert is not None:
        other = others[0].node.op_type if others else "a Constant node or an output"
        raise InputRefused(
            f"{step.weight} is a part of {value.name}, which {other} reads too: the part cannot change for one "
            "reader alone"
        )
    used = value_names(model)
    if value.name == step.weight:  # the changed weight keeps its name, the other readers' initializer gets theirs
        other_name = next((sites.name_of(site) for site in others), "")
        value.name = unused_name(other_name or f"{step.weight}.shared", used)
        used.remove(step.weight)
    isolated = new_initializer(model, unused_name(step.weight, used), tensor)
    if readers[0].layout is Layout.IN_OUT and step.spec.layout is Layout.OUT_IN:
        isolated.metadata_props[FOLDED_FROM] = repr([step.weight])
    for site in readers:
        site.node.replace_input_with(site.index, _copy_path(model, site, isolated))
    _remove_unused_path(value)
    return isolated


def _copy_path(model: ir.Model, site: Site, start: ir.Value) -> ir.Value:
    """Copy the nodes between a site's value and its reader, from `start` on. Returns the last copy's output."""
    between: list[ir.Node] = []
    at = site.node.inputs[site.index]
    while at is not site.value:
        assert at is not None
        node = at.producer()
        assert node is not None
        between.append(node)
        at = node.inputs[0]
    graph, last = site.node.graph, start
    assert graph is not None
    used = value_names(model)
    for node in reversed(between):
        name, old = unused_name(f"{start.name}_{node.op_type}", used), node.outputs[0]
        output = ir.Value(name=name, type=old.type, shape=old.shape)
        inputs = [last, *node.inputs[1:]]  # a DequantizeLinear has scales
        copy = ir.node(node.op_type, inputs, node.attributes, domain=node.domain, outputs=[output], name=name)
        graph.insert_before(site.node, copy)
        last = output
    return last


def _remove_unused_path(value: ir.Value) -> None:
    """Remove the nodes that only led from a weight to its former readers."""
    for node, _ in list(value.uses()):
        if node.op_type in ("Transpose", "Cast", "Identity", "DequantizeLinear"):
            _remove_unused_path(node.outputs[0])
            _remove_if_unused(node)
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant":
        _remove_if_unused(producer)


def _remove_if_unused(node: ir.Node) -> None:
    is_unused = not any(output.uses() or output.is_graph_output() for output in node.outputs)
    if is_unused and node.graph is not None:
        node.graph.remove(node, safe=True)


# --- Tables that an adapter repeats: PEFT saves the base's own embeddings beside the pair that changes them ---


def without_unchanged_tables(plan: Plan, sites: Sites) -> Plan:
    """The plan without the whole tensors that are equal to the graph's own, beside pairs that change them."""
    return replace(plan, steps=tuple(_without_equal_table(step, sites) for step in plan.steps))


def _without_equal_table(step: Step, sites: Sites) -> Step:
    if not step.terms or step.replace is None:
        return step
    own_sites = sites.by_name.get(step.weight, ())
    for site in own_sites:
        table = as_stored(step, site).replace
        if site.quantised is not None or table is None:
            return step
        own = site.tensor.numpy()[site.block_slices]
        if not np.array_equal(own, table.astype(own.dtype)):
            return step
    return replace(step, replace=None) if own_sites else step


def fold_graph(model: ir.Model, sites: Sites, plan: Plan) -> list[StepResult]:
    """Apply a plan to the weights of a graph, in memory. Returns statistics of each changed weight.

    ΔW and the sum are computed in fp32 and rounded once to the initializer's dtype. Only the plan's weights change: a
    reader that shared its tensor with others (tied or equal weights) gets an initializer of its own, and every other
    initializer keeps its bytes. `sites` is invalid afterwards.

    Raises InputRefused where a result is not finite. The graph is then partly changed and must not be used.
    """
    refuse_unsupported_steps(plan)
    return change_weights(model, sites, plan.steps)


def change_weights(model: ir.Model, sites: Sites, steps: Sequence[Step]) -> list[StepResult]:
    """Apply steps to every initializer that holds their weights. Nothing returned is of a weight that is replaced."""
    for step in steps:
        refuse_quantised(step, sites)
    results = []
    for step, alike in with_readers_alike(sites, steps):
        statistics = Statistics(step.weight)
        for change in isolate_changes(model, sites, step, alike):
            statistics.merge(change_in_memory(change))
        results += [] if step.is_replacement else [statistics.result()]
    return results


def change_in_memory(change: InitializerChange) -> Statistics:
    """Apply a change to its initializer. The statistics are empty where a whole tensor replaces the weight.

    Raises InputRefused as `fold_graph` does.
    """
    tensor, step = change.value.const_value, change.step
    assert tensor is not None
    before, statistics = change.indexed(tensor.numpy())[change.entries], Statistics(step.weight)
    is_transposed = step.spec.layout.is_transposed
    start = before if step.replace is None else step.replace
    with np.errstate(over="ignore", invalid="ignore"):  # refuse_not_finite checks the result
        if step.is_replacement:
            after = np.empty_like(start, dtype=before.dtype)
            sums.round_into(after, start)
            if step.token_rows is not None:
                step.token_rows.write_into(after)
        else:
            view = start.T if is_transposed else start  # (out, in, ...)
            total, delta = sums.summed(step, view)
            after = np.empty_like(total, dtype=before.dtype)
            sums.round_into(after, total)
            statistics.add_block(view, delta, after)
            after = after.T if is_transposed else after
    refuse_not_finite(step.weight, after, before=before)
    if change.is_block:  # the neighbours keep their bytes
        if not isinstance(tensor, _ChangedTensor):  # one copy for all changes of a tensor: it may hold many experts
            tensor = _ChangedTensor(tensor.numpy().copy(), name=change.value.name)
        change.indexed(tensor.numpy())[change.entries] = after
        change.value.const_value = tensor
    else:
        change.value.const_value = ir.Tensor(np.ascontiguousarray(after), name=change.value.name)
    return statistics


class _ChangedTensor(ir.Tensor[Any]):
    """A tensor of a merge's own, which may be changed in place."""
