"""Refusals of plans that a graph cannot take, and of results that are not finite."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused, MatchError, count
from lora_export.graph.find_sites import Sites
from lora_export.graph.operators import LATER_BIAS_INPUTS, node_bias
from lora_export.graph.site import Site
from lora_export.graph.values import before_reshapes, is_stored, stored_shape
from lora_export.lora import Adapter
from lora_export.options.spelling import command, named
from lora_export.plan import Plan, Step
from lora_export.plan.match_tensors import ITS_ROWS


def graph_remedy() -> str:
    """What helps where the weights of a graph cannot hold a change."""
    return (
        f"Keep the adapter beside the weights ({command('onnx', 'MODEL.onnx', lora='nodes')}), or merge into the float "
        "model and export or quantise that"
    )


def refuse_unsupported_steps(plan: Plan) -> None:
    """Raise InputRefused for steps that no graph can take: added tensors."""
    added = [step.weight for step in plan.steps if step.added]
    if added:
        raise InputRefused(f"the graph has no {', '.join(added)}: export the model with the head of the adapter")


def refuse_lost_biases(plan: Plan, sites: Sites) -> None:
    """Raise InputRefused where an adapter scales a bias too, and the plan lacks the bias that the graph adds.

    Its name is not known, or it cannot change while the graph runs.
    """
    planned, named_ones = {step.weight for step in plan.steps}, {spec.name for spec in sites.specs}
    for step in plan.low_rank:
        bias, term = re.sub(r"weight$", "bias", step.weight), step.terms[0]
        if term.pair.bias is None or bias in planned:
            continue
        if bias in named_ones or any(map(_adds_bias, sites.by_name.get(step.weight, ()))):
            raise InputRefused(
                f"{term.adapter}: {step.weight}: the change by {term.pair.kind} scales the bias of the layer too, "
                f"which this graph adds under another name, or cannot change. Export the model with the adapter in it "
                f"({named('lora', 'merged')})"
            )


def _adds_bias(site: Site) -> bool:
    """Whether a layer's node, or the one behind it, adds a vector of its outputs."""
    later = [node for node, _ in site.node.outputs[0].uses()]
    return (
        node_bias(site.node) is not None
        or any(node_bias(node, LATER_BIAS_INPUTS) is not None for node in later)
        or any(node.op_type == "Add" and any(_is_vector_of(site, value) for value in node.inputs) for node in later)
    )


def _is_vector_of(site: Site, value: ir.Value | None) -> bool:
    """Whether a value is stored, in whatever shape or dtype, and has one number for each output of a layer."""
    sources = () if value is None else before_reshapes(value)
    return any(is_stored(one) and math.prod(stored_shape(one)) == site.node_outputs for one in sources)


def refuse_steps_without_branch(plan: Plan) -> None:
    """Raise InputRefused for steps that can be merged into a graph's weights but not inserted beside them."""
    refuse_unsupported_steps(plan)
    for step in plan.low_rank:
        if step.replace is not None and step.has_dora:
            raise InputRefused(
                f"{step.terms[0].adapter}: {step.weight}: the adapter has a new table and a DoRA pair for this "
                "weight, which cannot be inserted beside the graph's weights. Merge the adapter instead"
            )


def refuse_transforms(plan: Plan, *, but_scalings: bool = False) -> None:
    """Raise InputRefused for changes that follow from the weight: they are not beside it, unless they scale a layer."""
    for term in (term for step in plan.low_rank for term in step.terms):
        if term.pair.needs_weight and not (but_scalings and term.pair.scaling() is not None):
            raise beside_the_weight(term.adapter, term.module, term.pair.kind)


def beside_the_weight(adapter: str, name: str, kind: str) -> InputRefused:
    """Why a change that follows from the weight is not beside it."""
    return InputRefused(
        f"{adapter}: {name}: the change by {kind} follows from the weight, so it cannot be beside it. Merge it "
        f"({named('lora', 'merged')})"
    )


def refuse_full_rank(plan: Plan, *, but_kronecker: bool = False) -> None:
    """Raise InputRefused for changes that are stored in another form, and whose A and B are no smaller than the weight.

    Those of LoKr, and whole changes, are of this kind: beside a weight, their factors would cost more than the weight.
    With `but_kronecker`, LoKr's own two factors are accepted where they cost less.
    """
    from lora_export.pairs.structured import KroneckerPair  # a merge does not ask

    refuse_transforms(plan, but_scalings=True)
    for step in plan.low_rank:
        for term in step.terms:
            if but_kronecker and isinstance(term.pair, KroneckerPair) and term.pair.is_cheap:
                continue
            if term.pair.is_structured and not term.pair.is_low_rank:
                raise InputRefused(
                    f"{term.adapter}: the change of {step.weight} {term.pair.shape} has the rank {term.pair.rank} as A "
                    "and B: beside the weight it would cost more than the weight itself. Merge it "
                    f"({named('lora', 'merged')})"
                )


@contextlib.contextmanager
def checkpoint_as_remedy(adapters: Sequence[Adapter], *, has_checkpoint: bool) -> Iterator[None]:
    """Add to a MatchError where to merge rows of a table that the graph has under no name, or under another one."""
    try:
        yield
    except MatchError as error:
        missing = {(misfit.adapter, misfit.key) for misfit in error.misfits if ITS_ROWS in misfit.problem}
        tables = ((adapter, name) for adapter in adapters for name in adapter.token_rows)
        lost = [name for adapter, name in tables if (adapter.name, adapter.spelled(name)) in missing]
        if not lost or error.remedy:
            raise
        found = "" if has_checkpoint else f"{named('checkpoint', 'CHECKPOINT')} finds a tied table. Or merge"
        raise error.with_remedy(
            f"The graph may have {', '.join(lost)} under another name. {found or 'Merge'} the adapter into the "
            "checkpoint, and export that"
        ) from error


@contextlib.contextmanager
def base_as_remedy(sites: Sites) -> Iterator[None]:
    """Name the option `checkpoint` in a MatchError, where layers of a graph without a checkpoint lack a certain name.

    Where one operator computes all experts of a layer, the error names that.
    """
    try:
        yield
    except MatchError as error:
        if sites.fused_experts:
            kinds = " and ".join(f"com.microsoft::{kind}" for kind in sorted(set(sites.fused_experts)))
            raise error.with_remedy(
                f"{len(sites.fused_experts)} {kinds} nodes of the graph compute all experts of a layer at once, with "
                "weights that have no names of the model: no adapter on experts is merged there or inserted beside "
                "them. Merge it into the checkpoint, and export that. onnxruntime's CPU provider computes some of "
                "these nodes wrongly (microsoft/onnxruntime#33866)"
            ) from error
        if not sites.unnamed:
            raise
        raise error.with_remedy(
            f"{count(len(sites.unnamed), 'linear layer')} of the graph lost the name, or contain several weights in "
            f"one, as a packed q, k and v. {named('checkpoint', 'CHECKPOINT')}, from which the graph was exported, "
            "finds the weights by their content"
        ) from error


def refuse_quantised(step: Step, sites: Sites) -> None:
    """Raise InputRefused where the weight is quantised: W + ΔW would have to be quantised again."""
    kinds = {site.quantised.kind for site in sites.by_name[step.spec.stored_name] if site.quantised is not None}
    if kinds and step.has_own_values:
        raise InputRefused(
            f"{step.weight} is quantised ({', '.join(sorted(kinds))}), and the adapter has values of its own for it. "
            f"{command('merge', requantize=True)} writes it in floats; or merge into the float model, and quantise that"
        )
    if kinds:
        raise InputRefused(
            f"{step.weight} is quantised ({', '.join(sorted(kinds))}), and quantised weights are not quantised again "
            f"by default. Keep the adapter beside the weight ({command('onnx', 'MODEL.onnx', lora='nodes')}), which is "
            "best for an adapter that was trained on a quantised base; or quantise the changed weight again "
            f"({command('merge', requantize=True)}), which rounds the change too; or merge into the float model, and "
            "quantise that"
        )


def refuse_not_finite(weight: str, after: NDArray[Any], *, before: NDArray[Any] | None = None) -> None:
    """Raise InputRefused where a result is not finite. The message tells whether it was finite before."""
    bad = after.size - np.count_nonzero(np.isfinite(after))
    if not bad:
        return
    if before is not None and not np.isfinite(before).all():
        reason = "the graph's own tensor has such values"
    else:
        limit = float(ml_dtypes.finfo(after.dtype).max)
        reason = f"the largest {after.dtype} is {limit:g}; check the adapter's scale, or export in float32"
    raise InputRefused(f"{weight}: {count(bad, 'value')} would not be finite: {reason}")
