"""Mode `rows`: an input selects an adapter for each row of a batch. 0 is the base.

All operators are standard ones, so that any provider runs them. A stacked (adapters + 1, in, rank) and B stacked
(adapters + 1, rank, out) are gathered by row and multiplied batch-wise. The first matrix of each stack is zeros.

Where many rows have few tokens each, these copies cost more than the products. In that case all rows are multiplied by
all A, each row keeps its own ranks, and these are multiplied by all B (tests/benchmarks/README.md has the
measurements). This was measured on a CPU, and is done in fp32 only: half precision is for other devices. A CPU computes
half precision in fp32, and onnxruntime would round the base at other points.

An embedding's A is one table of all adapters, in which each row looks up its own part. A convolution is computed for
all adapters, with their ranks concatenated, and each row keeps its own ranks: ONNX has no convolution with different
weights for each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.formats.onnx_adapter import (
    ADAPTER_IDS,
    ADAPTER_SCALES,
    ROW_ADAPTERS_KEY,
    refuse_beyond_low_rank,
    refuse_larger_ranks,
    refuse_new_tables,
)
from lora_export.formats.row_adapters import RowAdapters
from lora_export.graph.find_sites import Sites
from lora_export.graph.insert.adapter_names import module_of
from lora_export.graph.insert.adapter_stacks import AdapterStacks
from lora_export.graph.insert.batch_axis import BatchAxis, batch_axes, batch_input, infer_shapes, layer_input
from lora_export.graph.insert.dora import dora_factors_by_weight
from lora_export.graph.insert.inserter import Inserter
from lora_export.graph.insert.row_branches import RowBranches
from lora_export.graph.insert.row_heads import RowHeads, head_layers
from lora_export.graph.site import Site, common_dtype
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.plan.own_heads import Head

MIN_ROWS_OPSET = 15  # from here on, Shape has `start` and `end`


def insert_rows(
    model: ir.Model,
    sites: Sites,
    plan: Plan,
    *,
    batch: str = "batch",
    max_rank: int = 0,
    heads: Sequence[Head] = (),
    per_row: int = 1,
) -> None:
    """Insert every adapter of the plan beside its layers, in memory, selected by the new input `adapter_ids`.

    `adapter_ids` is int64 [batch]: 0 is the base, 1 the plan's first adapter, and so on. Their names are stored in the
    graph's metadata. Any other id, and a count that differs from the batch, ends a run with an error. Shorter ranks are
    padded with zeros, and an adapter without a pair for a weight is zeros there. B contains the scale. The base's
    weights keep their bytes. With `max_rank` every layer has this rank.

    With `per_row` above 1, each row has so many adapters: `adapter_ids` is [batch, per_row], and the input
    `adapter_scales`, float32 [batch, per_row], has a factor for each. The row's change is their sum.

    `heads` has, for each adapter, the layers that it brings whole: see `row_heads`. The graph's metadata then has the
    number of labels of each id.

    `batch` is the symbol of the first dimension of the graph's inputs. Where no input has it, the symbol that all
    inputs have there is used, or else the only one that enters every layer. The factors of DoRA (adapters + 1, out) are
    ones for an adapter without DoRA. A plan with DoRA must be made with `apart`, since no row has two adapters. `sites`
    is invalid afterwards.

    Raises InputRefused, with every such layer, where no dimension of a layer's input is the batch for certain; for
    adapters with more than low-rank pairs and linear layers; where a weight has a reader beside which no branch can be
    inserted; where an adapter overflows the weights' dtype or has a rank above `max_rank`; for DoRA and heads where a
    row has several adapters; and for an opset below 15. The graph is then partly changed and must not be used.
    """
    if model.opset_imports.get("", 0) < MIN_ROWS_OPSET:
        raise InputRefused(
            f"the graph has opset {model.opset_imports.get('', 0)}, and {named('lora', 'rows')} needs "
            f"{MIN_ROWS_OPSET}. Export the model again"
        )
    refuse_beyond_low_rank(plan.adapters)
    refuse_new_tables(plan)
    refuse_larger_ranks(plan, {step.weight: max_rank for step in plan.low_rank})
    _refuse_pairs_of_heads(plan, heads)
    if per_row > 1:
        _refuse_without_sum(plan, heads)
    inserter = Inserter(model)
    for name in (ADAPTER_IDS, *([ADAPTER_SCALES] if per_row > 1 else [])):
        if name in inserter.factory.value_names:
            raise InputRefused(f"the graph has an input or value {name} already: start from the graph without adapters")
    sites_by_weight = {
        step.weight: inserter.sites_of(step.weight, sites, is_embedding=step.terms[0].pair.embedding)
        for step in plan.low_rank
    }
    brought = head_layers(inserter, sites, heads)
    layers = [(weight, site) for weight, own_sites in sites_by_weight.items() for site in own_sites]
    layers += [(layer.module, site) for layer in brought for site in layer.sites]
    if any(layer_input(site).shape is None for _, site in layers):
        infer_shapes(model)
    first_input, batch = batch_input(model, batch, [site for _, site in layers])
    axes = batch_axes(layers, batch)
    branches = RowBranches(inserter.factory, first_input, len(plan.adapters), per_row)
    names = [adapter.name for adapter in plan.adapters]
    dora = {name: dora_factors_by_weight(plan.low_rank, name, sites_by_weight.__getitem__) for name in names}
    for step in plan.low_rank:
        own_sites = sites_by_weight[step.weight]
        stacks = AdapterStacks(inserter.factory, step, names, common_dtype(own_sites), max_rank=max_rank)
        factors = [dora[name].get(step.weight) for name in names]
        _insert_stacks(inserter, branches, stacks, factors, own_sites, axes)
    row_heads = RowHeads(inserter, branches, axes)
    for layer in brought:
        row_heads.insert(layer)
    inserter.finish()
    model.metadata_props[ROW_ADAPTERS_KEY] = str(RowAdapters(names, row_heads.labels(), per_row))


def _refuse_pairs_of_heads(plan: Plan, heads: Sequence[Head]) -> None:
    """Raise InputRefused for an adapter that has a pair for a layer and a tensor of it, such as its bias."""
    found = []
    for adapter, head in zip(plan.adapters, heads, strict=bool(heads)):
        own = {name.removesuffix(".bias").removesuffix(".weight"): name for name in head}
        paired = [step for step in plan.low_rank if any(term.adapter == adapter.name for term in step.terms)]
        found += [f"{adapter.name}, {own[name]}" for step in paired if (name := module_of(step.weight)) in own]
    if found:
        raise InputRefused(
            "a whole layer can be chosen by row, and not one tensor of a layer that has a pair, too:",
            listed(found),
            f"Merge such an adapter into a graph of its own ({named('lora', 'merged')}). Nothing was written.",
        )


def _refuse_without_sum(plan: Plan, heads: Sequence[Head]) -> None:
    """Raise InputRefused for what adapters on one row cannot add up: DoRA, and whole layers."""
    found = [f"{term.adapter}, {step.weight}: DoRA" for step in plan.low_rank if step.has_dora for term in step.terms]
    for adapter, head in zip(plan.adapters, heads, strict=bool(heads)):
        found += [f"{adapter.name}, {name}: a whole tensor" for name in head]
    if found:
        raise InputRefused(
            f"several adapters on one row ({named('per_row')}) are summed, and these have no sum:",
            listed(found),
            "Export them with one adapter for each row. Nothing was written.",
        )


def _insert_stacks(
    inserter: Inserter,
    branches: RowBranches,
    stacks: AdapterStacks,
    dora: Sequence[NDArray[np.float64] | None],
    sites: Sequence[Site],
    axes: Mapping[tuple[ir.Node, int], BatchAxis],
) -> None:
    """Insert the stacked factors of one weight beside its sites. `dora` has the factor of each adapter."""
    a, b = stacks.convolutions() if sites[0].is_convolution else stacks.pairs()
    factor = stacks.dora(dora) if stacks.step.has_dora else None
    for site in sites:
        axis = axes[site.node_input]
        rescaling = None if factor is None else branches.rescaling(site, axis, factor)
        if site.is_convolution:
            branch = partial(branches.convolution_branch, site, a, b, stacks.rank_mask())
        else:
            branch = partial(branches.branch, site, axis, a, b)
        inserter.insert_beside(site, branch, rescaling)
