"""Graphs that have inputs for adapters already: their contract, checked against the graph as it is now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.formats.onnx_adapter import AdapterSlot, Contract, read_contract
from lora_export.graph.find_readers import find_readers
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.base_fingerprint import (
    fingerprint,
    main_site,
    names_digest,
    quantisation_of,
    weight_digests,
)
from lora_export.graph.insert.dora import dora_factors_by_weight
from lora_export.graph.site import Site
from lora_export.graph.values import initializers
from lora_export.plan import Layout, Plan


def checked_contract(model: ir.Model, source: Path) -> Contract:
    """The contract of a graph with inputs for adapters, with each slot's dtype as it is now. Reads all base weights.

    Raises InputRefused, with all problems, where an input is missing or has another shape than in the contract, and
    where the base's weights changed after the inputs were added. What cannot be compared is accepted: a graph that was
    converted to another dtype, weights that were quantised since, and weights without an adapter that have lost their
    names.
    """
    contract = read_contract(model.metadata_props, source)
    sites = _base_sites(model, contract)
    digests = weight_digests(sites)
    slots = _with_current_dtypes(model, contract)
    problems = [*_input_problems(model, contract), *_weight_problems(contract, slots, sites, digests)]
    same_dtype = all(now.dtype == slot.dtype for now, slot in zip(slots, contract.slots, strict=True))
    same_names = names_digest(sites) == contract.names
    if not problems and same_dtype and same_names and fingerprint(digests) != contract.base:
        problems.append("weights without an adapter differ from those when the inputs were added")
    if problems:
        raise InputRefused(f"{source} does not agree with its own record of inputs for adapters:", listed(problems))
    return replace(contract, slots=tuple(slots))


def contract_dora_factors(
    model: ir.Model, contract: Contract, plan: Plan, adapter: str
) -> dict[str, NDArray[np.float64]]:
    """The factors of DoRA of one adapter, by weight, from the weights that the graph stores.

    Reads the weights that the adapter changes by DoRA. Raises InputRefused where one of them cannot be found, and as
    `site_dora_factors` does.
    """
    if not any(step.has_dora for step in plan.steps):
        return {}
    sites = _base_sites(model, contract)

    def sites_of(weight: str) -> Sequence[Site]:
        if weight not in sites.by_name:
            raise InputRefused(
                f"{adapter}, {weight}: DoRA needs the numbers of this weight, which cannot be found in the graph"
            )
        return sites.by_name[weight]

    return dora_factors_by_weight(plan.low_rank, adapter, sites_of)


def _base_sites(model: ir.Model, contract: Contract) -> Sites:
    """The sites of the base's weights: found by name, or by the initializer that the contract records."""
    sites = find_sites(model)
    by_name = {name: own_sites for name, own_sites in sites.by_name.items() if name not in contract.inputs}
    values = {value.name: value for value in initializers(model)}
    values |= {output.name: output for node in model.graph for output in node.outputs if node.op_type == "Constant"}
    for slot in contract.slots:
        if slot.weight not in by_name and slot.value in values:
            block = None if slot.block is None else range(*slot.block)
            readers = find_readers(values[slot.value], model.functions)
            own_sites = tuple(
                replace(site, name=slot.weight, block=block) for site in readers if _fits(site, slot, block)
            )
            by_name |= {slot.weight: own_sites} if own_sites else {}
    return replace(sites, by_name=by_name)


def _fits(site: Site, slot: AdapterSlot, block: range | None) -> bool:
    """Whether a site has the shape of the weight in a slot."""
    if slot.embedding or len(slot.shape) > 2 or not site.is_linear:
        return site.layout is slot.spec.layout and site.stored_shape == slot.spec.shape
    shape = site.stored_shape[::-1] if site.layout is Layout.IN_OUT else site.stored_shape
    out = len(block) if block is not None and block.stop <= shape[0] else shape[0]
    return (out, *shape[1:]) == slot.shape


def _with_current_dtypes(model: ir.Model, contract: Contract) -> list[AdapterSlot]:
    """The slots of a contract, with the dtypes of the inputs as they are now."""
    inputs = {value.name: value for value in model.graph.inputs}
    slots = []
    for slot in contract.slots:
        dtype = inputs[slot.a].dtype if slot.a in inputs else None
        slots.append(slot if dtype is None else replace(slot, dtype=str(dtype.numpy())))
    return slots


def _input_problems(model: ir.Model, contract: Contract) -> list[str]:
    """What is wrong with the inputs of the slots."""
    inputs = {value.name: value for value in model.graph.inputs}
    problems: list[str] = []
    for slot in contract.slots:
        values = {name: inputs[name] for name in slot.input_shapes if name in inputs}
        problems += [f"{name}: no optional input of that name" for name in slot.input_shapes if name not in inputs]
        if len(values) == len(slot.input_shapes):
            problems += _shape_problems(slot, values, is_required=contract.required)
    return problems


def _shape_problems(slot: AdapterSlot, values: Mapping[str, ir.Value], *, is_required: bool) -> list[str]:
    weight, first = " x ".join(map(str, slot.shape)), values[slot.a]
    problems = []
    for name, value in values.items():
        sizes = list(value.shape or ())
        wanted = slot.input_shapes[name]
        pairs = list(zip(wanted, sizes, strict=False))
        if len(sizes) != len(wanted) or any(size is not None and size != actual for size, actual in pairs):
            problems.append(f"{name}: has the shape {value.shape}, its weight is {weight}")
        elif (not value.is_initializer() and not is_required) or any(
            size is None and isinstance(actual, int) for size, actual in pairs
        ):
            problems.append(f"{name}: its rank is fixed, or it has no default")
        elif value.dtype != first.dtype:
            problems.append(f"{name}: is {value.dtype}, {first.name} is {first.dtype}")
    return problems


def _weight_problems(
    contract: Contract, slots: Sequence[AdapterSlot], sites: Sites, digests: Mapping[str, str]
) -> list[str]:
    """The weights of slots that have changed since their inputs were added, where they can be compared."""
    kinds = {name: quantisation_of(main_site(own_sites)) for name, own_sites in sites.by_name.items()}
    problems = []
    for now, slot in zip(slots, contract.slots, strict=True):
        is_comparable = now.dtype == slot.dtype and kinds.get(slot.weight, slot.quantised) == slot.quantised
        if is_comparable and digests.get(slot.weight, slot.digest) != slot.digest:
            problems.append(f"{slot.weight}: differs from the weight for which the inputs were added")
    return problems
