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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.formats.contract import ADAPTER_IDS, ADAPTER_SCALES, RowAdapters
from lora_export.formats.onnx_adapter import cast_factor, refuse_beyond_low_rank, refuse_larger_ranks, refuse_new_tables
from lora_export.graph.find_sites import Sites
from lora_export.graph.insert.adapter_names import DORA_FACTOR, LORA_A, LORA_B, SCALE, module_of
from lora_export.graph.insert.batch_axis import BatchAxis, batch_axes, batch_input, infer_shapes
from lora_export.graph.insert.branches import Inserter, dora_factors_by_weight
from lora_export.graph.insert.node_factory import MIN_ROWS_OPSET, Factor, NodeFactory, layer_input
from lora_export.graph.insert.row_branches import RowBranches
from lora_export.graph.insert.row_heads import HeadLayer, HeadOutputs, HeadStacks, RowHeads, head_layers
from lora_export.graph.site import Site, common_dtype
from lora_export.options.spelling import named
from lora_export.plan import Plan, Step
from lora_export.plan.own_heads import Head
from lora_export.provenance import ROW_ADAPTERS_KEY


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
    `adapter_scales`, float32 [batch, per_row], has a factor for each. The row's change is their sum. The factor of id 0
    is not read.

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
    inserter = inserter_of_rows(model, "rows", per_row)
    refuse_beyond_low_rank(plan.adapters)
    refuse_new_tables(plan)
    refuse_larger_ranks(plan, {step.weight: max_rank for step in plan.low_rank})
    refuse_without_rows(plan, heads, per_row)
    sites_by_weight = {
        step.weight: inserter.sites_of(step.weight, sites, is_embedding=step.terms[0].pair.embedding, apart=True)
        for step in plan.low_rank
    }
    names = [adapter.name for adapter in plan.adapters]
    dora = {name: dora_factors_by_weight(plan.low_rank, name, sites_by_weight.__getitem__) for name in names}
    steps = {step.weight: step for step in plan.low_rank}

    def stacks_of(weight: str) -> AdapterStacks:
        dtype, own = common_dtype(sites_by_weight[weight]), [dora[name].get(weight) for name in names]
        return AdapterStacks(inserter.factory, steps[weight], names, dtype, own, max_rank=max_rank)

    insertion = RowInsertion(inserter, sites_by_weight, head_layers(inserter, sites, heads), batch)
    outputs = insertion.insert(len(names), per_row, stacks_of, RowHeads.stored)
    labels = {output: found.layer.labels for found in outputs for output in found.names}
    model.metadata_props[ROW_ADAPTERS_KEY] = str(RowAdapters(names, labels, per_row))


def inserter_of_rows(model: ir.Model, lora: str, per_row: int) -> Inserter:
    """An inserter into a graph whose rows choose no adapters yet. Raises InputRefused for another, or an old one."""
    inserter = Inserter(model)
    inserter.factory.require_opset(MIN_ROWS_OPSET, named("lora", lora))
    for name in (ADAPTER_IDS, *([ADAPTER_SCALES] if per_row > 1 else [])):
        if name in inserter.factory.value_names:
            raise InputRefused(f"the graph has an input or value {name} already: start from the graph without adapters")
    return inserter


class Stacks(Protocol):
    """The factors of all adapters for one weight; entry 0 of each is the base's, which adds nothing."""

    def pairs(self) -> tuple[Factor, Factor] | None: ...  # (adapters + 1, in, rank), (adapters + 1, rank, out)
    def convolutions(self) -> tuple[Factor, Factor] | None: ...  # (ranks, in, kernel), (out, ranks, 1...)
    def rank_mask(self) -> NDArray[np.bool_]: ...  # (adapters + 1, ranks)
    def of_outputs(self) -> Factor | None: ...  # (adapters + 1, out)
    def of_inputs(self) -> Factor | None: ...  # (adapters + 1, in)


@dataclass(frozen=True, eq=False)
class RowInsertion:
    """Branches beside weights, and layers in the place of others, that `adapter_ids` selects by row."""

    inserter: Inserter
    sites_by_weight: Mapping[str, tuple[Site, ...]]
    layers: Sequence[HeadLayer]
    batch: str

    def insert(
        self,
        adapters: int,
        per_row: int,
        stacks_of: Callable[[str], Stacks],
        stacks_of_head: Callable[[RowHeads, HeadLayer], HeadStacks],
        *,
        by_copies: bool = False,
    ) -> list[HeadOutputs]:
        """Insert them, and the inputs that choose. Raises InputRefused as `batch_input` and `batch_axes` do."""
        model = self.inserter.factory.model
        layers = [(weight, site) for weight, own_sites in self.sites_by_weight.items() for site in own_sites]
        layers += [(layer.module, site) for layer in self.layers for site in layer.sites]
        if any(layer_input(site).shape is None for _, site in layers):
            infer_shapes(model)
        first_input, batch = batch_input(model, self.batch, [site for _, site in layers])
        axes = batch_axes(layers, batch)
        branches = RowBranches(self.inserter.factory, first_input, adapters, per_row, by_copies=by_copies)
        for weight, own_sites in self.sites_by_weight.items():
            _insert_stacks(self.inserter, branches, stacks_of(weight), own_sites, axes)
        row_heads = RowHeads(self.inserter, branches, axes)
        for layer in self.layers:
            row_heads.insert(layer, stacks_of_head(row_heads, layer))
        self.inserter.finish()
        return row_heads.outputs()


def refuse_without_rows(plan: Plan, heads: Sequence[Head], per_row: int) -> None:
    """Raise InputRefused for what rows cannot choose: a tensor of a layer with a pair; several with no sum."""
    _refuse_pairs_of_heads(plan, heads)
    if per_row > 1:
        _refuse_without_sum(plan, heads)


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
            f"Merge such an adapter into a graph of its own ({named('lora', 'merged')})",
        )


def _refuse_without_sum(plan: Plan, heads: Sequence[Head]) -> None:
    """Raise InputRefused for what adapters on one row cannot add up: DoRA, and whole layers."""
    found = [
        f"{term.adapter}, {step.weight}: {'DoRA' if step.has_dora else term.pair.kind}"
        for step in plan.low_rank
        for term in step.terms
        if step.has_dora or term.pair.scaling() is not None
    ]
    for adapter, head in zip(plan.adapters, heads, strict=bool(heads)):
        found += [f"{adapter.name}, {name}: a whole tensor" for name in head]
    if found:
        raise InputRefused(
            f"several adapters on one row ({named('per_row')}) are summed, and these have no sum:",
            listed(found),
            "Export them with one adapter for each row",
        )


def _insert_stacks(
    inserter: Inserter,
    branches: RowBranches,
    stacks: Stacks,
    sites: Sequence[Site],
    axes: Mapping[tuple[ir.Node, int], BatchAxis],
) -> None:
    """Insert the stacked factors of one weight beside its sites."""
    pair = stacks.convolutions() if sites[0].is_convolution else stacks.pairs()
    factor, scale = stacks.of_outputs(), stacks.of_inputs()
    for site in sites:
        axis = axes[site.node_input]
        own = branches.of_layer(axis)
        if scale is not None:
            inserter.scale_input(site, *own.scaled_input(site, axis, scale))
        rescaling = None if factor is None else own.rescaling(site, axis, factor)
        if pair is None:
            inserter.insert_beside(site, None, rescaling)
            continue
        if site.is_convolution:
            branch = partial(own.convolution_branch, site, *pair, stacks.rank_mask())
        else:
            branch = partial(own.branch, site, axis, *pair)
        inserter.insert_beside(site, branch, rescaling)


# --- The factors of all adapters for one weight, stacked: entry 0 is the base, which adds nothing ---


class AdapterStacks:
    """Makes initializers of the factors that a plan's adapters have for one weight.

    `adapters` are the adapters' names in the order of their ids, `dtype` is that of the weight's readers, and `dora`
    has the factor of each adapter. Each adapter with a pair has at least the rank `max_rank`: zeros fill it.
    """

    def __init__(
        self,
        factory: NodeFactory,
        step: Step,
        adapters: Sequence[str],
        dtype: str,
        dora: Sequence[NDArray[np.float64] | None] = (),
        *,
        max_rank: int = 0,
    ):
        self.factory, self.step, self.dtype, self.dora = factory, step, dtype, dora or [None] * len(adapters)
        own_steps = [step.for_adapter(name) for name in adapters]
        self.scalings = [None if own is None else own.scaling for own in own_steps]
        paired = [() if own is None or own.scaling is not None else own.terms for own in own_steps]
        self.factors = [[term.factors for term in terms] for terms in paired]
        ranks = [sum(term.pair.rank for term in terms) for terms in paired]
        for factors, rank in zip(self.factors, ranks, strict=True):
            if factors and rank < max_rank:
                factors.append(self._zeros(*factors[0], max_rank - rank))
        self.ranks = [max(rank, max_rank) if rank else 0 for rank in ranks]

    def pairs(self) -> tuple[Factor, Factor] | None:
        """A (adapters + 1, in, rank) and B (adapters + 1, rank, out), padded with zeros to the largest rank.

        An embedding's A is one table: (adapters + 1) times its rows, rank. None where no adapter has a pair.
        """
        if not any(self.ranks):
            return None
        out_features, in_features = self.step.terms[0].pair.shape
        rank = max(self.ranks)
        stacked_a = np.zeros((len(self.factors) + 1, in_features, rank), np.float32)
        stacked_b = np.zeros((len(self.factors) + 1, rank, out_features), np.float32)
        for number, factors in enumerate(self.factors, 1):
            begin = 0
            for a, b in factors:
                ranks = slice(begin, begin := begin + len(b))
                stacked_a[number, :, ranks] = a
                stacked_b[number, ranks] = b
        table = stacked_a.reshape(-1, rank) if self.step.terms[0].pair.embedding else stacked_a
        return self._initializer(LORA_A, table), self._initializer(LORA_B, stacked_b)

    def convolutions(self) -> tuple[Factor, Factor] | None:
        """A (ranks, in, kernel) and B (out, ranks, 1...), ranks of all adapters concatenated; None without pairs."""
        if not any(self.ranks):
            return None
        factors = [pair for own in self.factors for pair in own]
        a, b = np.concatenate([a for a, _ in factors]), np.concatenate([b for _, b in factors], axis=1)
        return self._initializer(LORA_A, a), self._initializer(LORA_B, b)

    def rank_mask(self) -> NDArray[np.bool_]:
        """Which of the concatenated ranks belong to each adapter: (adapters + 1, ranks)."""
        owner = np.repeat(np.arange(len(self.ranks)) + 1, self.ranks)
        mask: NDArray[np.bool_] = owner == np.arange(len(self.ranks) + 1)[:, None]
        return mask

    def of_outputs(self) -> Factor | None:
        """The factors of outputs (adapters + 1, out), DoRA's among them; ones where an adapter has none."""
        pairs = zip(self.dora, self._scalings(of_inputs=False), strict=True)
        return self._factors(DORA_FACTOR, [one if one is not None else other for one, other in pairs], 0)

    def of_inputs(self) -> Factor | None:
        """The factors of inputs (adapters + 1, in)."""
        return self._factors(SCALE, self._scalings(of_inputs=True), 1)

    def _scalings(self, *, of_inputs: bool) -> list[NDArray[np.float32] | None]:
        """The factors that each adapter's scaling has of this side."""
        return [own.factors if own and own.of_inputs == of_inputs else None for own in self.scalings]

    def _factors(self, part: str, own: Sequence[NDArray[Any] | None], axis: int) -> Factor | None:
        if all(factors is None for factors in own):
            return None
        stack = np.ones((len(own) + 1, self.step.terms[0].pair.shape[axis]))
        for row, factors in zip(stack[1:], own, strict=True):
            row[:] = 1 if factors is None else factors.reshape(-1)
        return self._initializer(part, stack)

    def _zeros(self, a: NDArray[Any], b: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A and B of this rank in the shapes of others, all zeros."""
        if a.ndim > 2:  # A (rank, in, kernel) and B (out, rank, 1...) of a convolution
            return np.zeros((rank, *a.shape[1:]), a.dtype), np.zeros((len(b), rank, *b.shape[2:]), b.dtype)
        return np.zeros((len(a), rank), a.dtype), np.zeros((rank, b.shape[1]), b.dtype)

    def _initializer(self, part: str, array: NDArray[Any]) -> Factor:
        in_dtype = cast_factor(self.step.weight, part, array, self.dtype)
        return self.factory.factor(module_of(self.step.weight), part, in_dtype)
