"""What a graph's adapter inputs take of an adapter: of a run, or of one of its slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import plan
from lora_export.artifacts.files import graphs_in
from lora_export.errors import MatchError, count
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import AdapterArrays, AdapterPlace, Contract
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_inputs import checked_contract, contract_dora_factors
from lora_export.graph.insert.adapter_names import module_of
from lora_export.graph.insert.adapter_slots import head_values
from lora_export.graph.merge.fold import without_unchanged_tables
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.refusals import refuse_lost_biases
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import command
from lora_export.plan import Plan
from lora_export.plan.match_tensors import NO_WEIGHT
from lora_export.plan.own_heads import Head, own_heads, without_own_head
from lora_export.provenance import CONTRACT_KEY, SLOTS_KEY
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.several_graphs import SeveralGraphs

UNKNOWN_LENGTH = 0.02  # of a weight's numbers, where the weight has lost its name


class AdapterValues(NamedTuple):
    """The values of a graph's inputs for one adapter, and where its pairs landed."""

    arrays: dict[str, NDArray[Any]]
    plan: Plan


class TakingGraph(NamedTuple):
    """A graph whose inputs take adapters, and where its weights are."""

    path: Path
    model: ir.Model
    contract: Contract
    sites: Sites


def taking_graphs(path: Path) -> list[TakingGraph]:
    """The graph of this path; of a folder of several graphs, those that take adapters.

    Raises InputRefused where there is none, and as `checked_contract` does.
    """
    files = graphs_in(path)
    if not files:
        return [_taking(path, load_graph(path))]
    models = {path / name: load_graph(path / name) for name in files}
    taking = {
        one: model for one, model in models.items() if not {CONTRACT_KEY, SLOTS_KEY}.isdisjoint(model.metadata_props)
    }
    return [_taking(one, model) for one, model in (taking or models).items()]


def _taking(path: Path, model: ir.Model) -> TakingGraph:
    return TakingGraph(path, model, checked_contract(model, path), find_sites(model))


def adapter_values(adapter: Adapter, strength: float, graphs: Sequence[TakingGraph]) -> list[AdapterValues]:
    """The values of one adapter, scaled and padded, for each of the graphs of one model.

    Raises InputRefused, with every misfit, for what none of the graphs takes.
    """
    specs = [spec for graph in graphs for spec in graph.sites.specs]
    heads = own_heads([adapter], specs) if any(graph.contract.heads for graph in graphs) else []
    own = without_own_head(adapter) if heads else adapter
    onnx_adapter.refuse_beyond_low_rank([own])
    places = {place.weight: place.spec for graph in graphs for place in graph.contract.places}
    names = [spec.name for spec in specs]
    try:
        steps = plan.make([own], list(places.values()), strengths=[strength], around=names)
    except MatchError as error:
        how = command("onnx", lora="slots" if graphs[0].contract.slots else "inputs", target="NAMES")
        raise error.with_words(NO_WEIGHT, "the graph takes no adapter at").with_remedy(
            f"{graphs[0].path} takes adapters at {count(len(places), 'layer')}. `{how}` makes a graph that takes them "
            "at others"
        ) from error
    return [_values_in(graph, adapter.name, steps, heads) for graph in graphs]


def _values_in(graph: TakingGraph, adapter: str, steps: Plan, heads: Sequence[Head]) -> AdapterValues:
    """The values of those steps that change weights of a graph."""
    taken = {place.weight for place in graph.contract.places}
    steps = replace(steps, steps=tuple(step for step in steps.steps if step.weight in taken))
    if any(step.replace is not None for step in steps.low_rank):
        steps = without_unchanged_tables(steps, graph.sites)
    onnx_adapter.refuse_new_tables(steps)
    refuse_lost_biases(steps, graph.sites)
    onnx_adapter.refuse_dora_without_factor(graph.contract, steps)
    factors = contract_dora_factors(graph.model, graph.contract, steps, adapter)
    arrays = onnx_adapter.input_values(graph.contract, steps, adapter, factors)
    for head in heads:
        arrays |= head_values(graph.contract, graph.sites, adapter, head)
    return AdapterValues(arrays, steps)


def with_filled_slots(
    runner: OnnxRunner | SeveralGraphs, adapters: Sequence[Adapter], strengths: Sequence[float] | None
) -> OnnxRunner | SeveralGraphs:
    """The runner with these adapters in its slots, from slot 1 on. Raises as `adapter_values` does."""
    graphs = taking_graphs(runner.path)
    values: dict[str, dict[str, AdapterArrays]] = {graph.path.name: {} for graph in graphs}
    for adapter, strength in zip(adapters, strengths or [1.0] * len(adapters), strict=True):
        for graph, own in zip(graphs, adapter_values(adapter, strength, graphs), strict=True):
            values[graph.path.name][adapter.name] = own.arrays
    if isinstance(runner, OnnxRunner):
        return runner.with_slots(values[runner.path.name])
    return runner.with_slots(lambda graph: values[graph.path.name])


def generated_adapters(path: Path) -> list[Adapter]:
    """Two random adapters for the slots of a model, of the rank that they take: ‖ΔW‖ is a tenth of ‖W‖ at each layer.

    `path` is as of `taking_graphs`.
    """
    places, lengths = dict[str, AdapterPlace](), dict[str, float]()
    for graph in taking_graphs(path):
        places |= {place.weight: place for place in graph.contract.places}
        lengths |= {
            name: float(np.sqrt(np.mean(np.square(graph.sites.by_name[name][0].array.astype(np.float64)))))
            for name in places
            if name in graph.sites.by_name
        }
    return [_generated(places.values(), lengths, seed) for seed in range(2)]


def _generated(places: Iterable[AdapterPlace], lengths: Mapping[str, float], seed: int) -> Adapter:
    rng, pairs = np.random.default_rng(seed), {}
    for place in places:
        out, *inner = place.shape
        rank = place.max_rank
        a = rng.standard_normal((rank, *inner), np.float32)
        b = rng.standard_normal((out, rank, *[1] * (len(inner) - 1)), np.float32)
        scale = 0.1 * lengths.get(place.weight, UNKNOWN_LENGTH) / rank**0.5
        pairs[module_of(place.weight)] = LoraPair(a, b, scale, embedding=place.embedding)
    return Adapter(name=f"generated {seed + 1}", format="generated", pairs=pairs)
