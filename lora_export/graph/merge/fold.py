"""Merging a plan into a graph's weights in memory: W' = W + ΔW, in place of W."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export import sums
from lora_export.graph.find_sites import Sites
from lora_export.graph.merge.isolate import InitializerChange, isolate_changes
from lora_export.graph.refusals import refuse_not_finite, refuse_quantised, refuse_unsupported_steps
from lora_export.plan import Plan, Step
from lora_export.weights.merge_report import Statistics, StepResult


def fold_graph(model: ir.Model, sites: Sites, plan: Plan) -> list[StepResult]:
    """Apply a plan to the weights of a graph, in memory. Returns statistics of each changed weight.

    ΔW and the sum are computed in fp32 and rounded once to the initializer's dtype. Only the plan's weights change: a
    reader that shared its tensor with others (tied or equal weights) gets an initializer of its own, and every other
    initializer keeps its bytes. `sites` is invalid afterwards.

    Raises InputRefused where a result is not finite. The graph is then partly changed and must not be used.
    """
    refuse_unsupported_steps(plan)
    for step in plan.steps:
        refuse_quantised(step, sites)
    return [result for step in plan.steps if (result := change_weight(model, sites, step)) is not None]


def change_weight(model: ir.Model, sites: Sites, step: Step) -> StepResult | None:
    """Apply one step to every initializer that holds its weight. None where a whole tensor replaces the weight."""
    refuse_quantised(step, sites)
    statistics = Statistics(step.weight)
    for change in isolate_changes(model, sites, step):
        statistics.merge(change_in_memory(change))
    return None if step.is_replacement else statistics.result()


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
            after = start.astype(before.dtype)
        else:
            view = start.T if is_transposed else start  # (out, in, ...)
            total, delta = sums.summed(step, view)
            after = total.astype(before.dtype)
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
