"""What a graph's adapter inputs take of an adapter: of a run, or of one of its slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import plan
from lora_export.errors import MatchError
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import Contract
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
from lora_export.plan.own_heads import own_heads, without_own_head
from lora_export.runtime.onnx_runner import OnnxRunner

UNKNOWN_LENGTH = 0.02  # of a weight's numbers, where the weight has lost its name


class AdapterValues(NamedTuple):
    """The values of a graph's inputs for one adapter, and where its pairs landed."""

    arrays: dict[str, NDArray[Any]]
    plan: Plan


def adapter_values(
    adapter: Adapter, strength: float, model: ir.Model, contract: Contract, sites: Sites, graph: Path
) -> AdapterValues:
    """The values of one adapter, scaled and padded, for a graph with this contract (`checked_contract`).

    Raises InputRefused, with every misfit, for what the graph does not take.
    """
    heads = own_heads([adapter], sites.specs) if contract.heads else []
    own = without_own_head(adapter) if heads else adapter
    onnx_adapter.refuse_beyond_low_rank([own])
    names = [spec.name for spec in sites.specs]
    try:
        steps = plan.make([own], [place.spec for place in contract.places], strengths=[strength], around=names)
    except MatchError as error:
        how = command("onnx", lora="slots" if contract.slots else "inputs", target="NAMES")
        raise error.with_words(NO_WEIGHT, "the graph takes no adapter at").with_remedy(
            f"{graph} takes adapters at {len(contract.places)} layers. `{how}` makes a graph that takes them at others"
        ) from error
    if any(step.replace is not None for step in steps.low_rank):
        steps = without_unchanged_tables(steps, sites)
    onnx_adapter.refuse_new_tables(steps)
    refuse_lost_biases(steps, find_sites(model))
    onnx_adapter.refuse_dora_without_factor(contract, steps)
    factors = contract_dora_factors(model, contract, steps, adapter.name)
    arrays = onnx_adapter.input_values(contract, steps, adapter.name, factors)
    for head in heads:
        arrays |= head_values(contract, sites, adapter.name, head)
    return AdapterValues(arrays, steps)


def with_filled_slots(runner: OnnxRunner, adapters: Sequence[Adapter], strengths: Sequence[float] | None) -> OnnxRunner:
    """The runner with these adapters in the slots of its graph, from slot 1 on. Raises as `adapter_values` does."""
    model = load_graph(runner.path)
    contract, sites = checked_contract(model, runner.path), find_sites(model)
    scaled = zip(adapters, strengths or [1.0] * len(adapters), strict=True)
    values = {one.name: adapter_values(one, by, model, contract, sites, runner.path).arrays for one, by in scaled}
    return runner.with_slots(values)


def generated_adapters(graph: Path) -> list[Adapter]:
    """Two random adapters for a graph of slots, of the rank that it takes: ‖ΔW‖ is a tenth of ‖W‖ at each layer."""
    model = load_graph(graph)
    contract, by_name = checked_contract(model, graph), find_sites(model).by_name
    lengths = {
        place.weight: float(np.sqrt(np.mean(np.square(by_name[place.weight][0].array.astype(np.float64)))))
        if place.weight in by_name
        else UNKNOWN_LENGTH
        for place in contract.places
    }
    return [_generated(contract, lengths, seed) for seed in range(2)]


def _generated(contract: Contract, lengths: Mapping[str, float], seed: int) -> Adapter:
    rng, pairs = np.random.default_rng(seed), {}
    for place in contract.places:
        out, *inner = place.shape
        rank = place.max_rank
        a = rng.standard_normal((rank, *inner), np.float32)
        b = rng.standard_normal((out, rank, *[1] * (len(inner) - 1)), np.float32)
        scale = 0.1 * lengths[place.weight] / rank**0.5
        pairs[module_of(place.weight)] = LoraPair(a, b, scale, embedding=place.embedding)
    return Adapter(name=f"generated {seed + 1}", format="generated", pairs=pairs)
