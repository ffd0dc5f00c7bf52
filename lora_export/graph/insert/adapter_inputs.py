"""Mode `inputs`: A and B as optional inputs of the graph, which onnxruntime fills from an adapter file.

The graph's contract lists them, with fingerprints of the base weights that an adapter file was made for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.formats.contract import ADAPTER_STRENGTHS, AdapterPlace, Contract, HeadPlace, read_contract
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_names import CONVENTIONS, DORA_FACTOR, LORA_A, LORA_B, SCALE, dotted, module_of
from lora_export.graph.insert.adapter_nodes import scaled_input
from lora_export.graph.insert.adapter_strengths import StrengthInput, refused_strength
from lora_export.graph.insert.branches import Inserter, common_rescaling, dora_factors_by_weight
from lora_export.graph.insert.node_factory import Factor, NodeFactory
from lora_export.graph.site import Site, common_dtype, find_readers
from lora_export.graph.values import initializers, refuse_old_ir
from lora_export.options.export import OnnxOptions
from lora_export.plan import Layout, Plan
from lora_export.provenance import CONTRACT_KEY
from lora_export.storage.hashes import ALGORITHMS, FAST

ACTIVE_ADAPTER = "adapter"  # whose strength a graph has that takes one adapter at a time


def insert_inputs(
    model: ir.Model,
    sites: Sites,
    weights: Iterable[str],
    *,
    names: str = OnnxOptions.names,
    dora: Iterable[str] = (),
    scaled: Iterable[str] = (),
    max_rank: int = 0,
    required: bool = False,
    strength_input: bool = False,
) -> Contract:
    """Give the layers of these weights A and B as optional inputs, in memory. See `AdapterPlace` for the shapes.

    Each input has an initializer of the same name as its default. The default has rank 0 (a convolution's has one rank
    of zeros), so that without an adapter the layer gains zeros and the graph computes what it did. The rank of each
    layer has a symbol of its own, so that an adapter's ranks may differ. With `max_rank` every rank is this one, and
    the default is zeros: no shape of an adapter is dynamic. With `required` there is no default. The weights in `dora`
    also get an input for the factor of each output, by default ones, which multiplies the sum before the bias is added;
    those in `scaled` one for the factor of each of the layer's inputs. With `strength_input`, B is multiplied by one
    more input (see `StrengthInput`), and neither of these is there.
    `names` is one of CONVENTIONS. The returned contract lists the inputs, their positions and the base's fingerprint.
    It is stored in the graph's metadata too. `sites` is invalid afterwards.

    Reads all weights of the base for their fingerprint. Raises InputRefused where a weight has a reader beside which no
    branch can be inserted, where the graph has an input of that name already, and for one in an IR version before 4.
    The graph is then partly changed and must not be used.
    """
    refuse_old_ir(model)
    if CONTRACT_KEY in model.metadata_props:
        raise InputRefused("the graph has inputs for adapters already: start from the graph without them")
    digests, inserter = weight_digests(sites), Inserter(model)
    if strength_input and (factors_of := sorted({*dora, *scaled})):
        raise refused_strength("DoRA and IA3 have factors that no strength multiplies", factors_of)
    strengths = StrengthInput(model, inserter.factory, [ACTIVE_ADAPTER]) if strength_input else None
    own: dict[str, Any] = {"names": names, "dora": dora, "scaled": scaled, "max_rank": max_rank}
    places = []
    for place, own_sites in places_of(inserter, sites, weights, digests, **own, allow_changed_weight=True):
        factors = _add_inputs(inserter.factory, place)
        b = strengths.times(factors[LORA_B], ACTIVE_ADAPTER) if strengths else factors[LORA_B]
        for site in own_sites:
            if place.scale:
                inserter.scale_input(site, *scaled_input(inserter.factory, site, factors[SCALE]))
            factor = factors.get(DORA_FACTOR)
            rescaling = common_rescaling(inserter.factory, site, factor) if factor else None
            inserter.insert(site, [(factors[LORA_A], b)], rescaling)
        places.append(place)
    inserter.finish()
    contract = Contract(fingerprint(digests), names_digest(sites), tuple(places), required)
    for name in [*contract.inputs, *([ADAPTER_STRENGTHS] if strengths else [])] if required else ():
        model.graph.initializers.pop(name).const_value = None
    model.metadata_props[CONTRACT_KEY] = str(contract)
    return contract


def places_of(
    inserter: Inserter,
    sites: Sites,
    weights: Iterable[str],
    digests: Mapping[str, str],
    *,
    names: str,
    dora: Iterable[str],
    scaled: Iterable[str],
    max_rank: int,
    **options: bool,
) -> Iterator[tuple[AdapterPlace, tuple[Site, ...]]]:
    """The places of an adapter beside weights, and the weights' sites. `options` are those of `Inserter.sites_of`."""
    with_dora, with_scale, name_of = set(dora), set(scaled), CONVENTIONS[names]
    for weight in weights:
        readers = sites.by_name.get(weight, ())  # none for a part of a weight, which `sites_of` refuses
        embedding = bool(readers) and all(site.layout is Layout.EMBEDDING for site in readers)
        own_sites = inserter.sites_of(weight, sites, is_embedding=embedding, **options)
        site, module = own_sites[0], module_of(weight)
        place = AdapterPlace(
            weight,
            a=name_of(module, LORA_A, embedding),
            b=name_of(module, LORA_B, embedding),
            shape=site.shape[::-1] if embedding or site.layout is Layout.IN_OUT else site.shape,
            dtype=common_dtype(own_sites),
            digest=digests[weight],
            factor=name_of(module, DORA_FACTOR, embedding) if weight in with_dora else "",
            embedding=embedding,
            value=site.value.name or "",
            block=(site.block.start, site.block.stop) if site.block is not None else None,
            quantised=quantisation_of(site),
            max_rank=max_rank,
            scale=name_of(module, SCALE, embedding) if weight in with_scale else "",
        )
        yield place, own_sites


def _add_inputs(factory: NodeFactory, place: AdapterPlace) -> dict[str, Factor]:
    """Add the inputs of a layer: A, B, and the factors of its outputs and inputs where it takes such. By their part."""
    module = module_of(place.weight)
    # A symbol of its own: onnxruntime lets tensors of equal symbols share memory.
    rank = dotted(module, "lora_r")
    parts = {place.a: LORA_A, place.b: LORA_B, place.factor: DORA_FACTOR, place.scale: SCALE}
    factors = {}
    for name, array in place.without_adapter().items():
        part = parts[name]
        factor = factory.factor(module, part, array, name=name)
        factor.value.shape = ir.Shape([rank if size is None else size for size in place.input_shapes[name]])
        factory.model.graph.inputs.append(factor.value)
        factors[part] = factor
    return factors


def weight_digests(sites: Sites) -> dict[str, str]:
    """A hash of every named weight, in the orientation of the model. Reads all weights.

    Of a quantised weight the stored tensors are hashed: integers, scales and zero points, neighbouring blocks included.
    """
    of_packed_nodes: dict[ir.Node, str] = {}
    return {name: _weight_digest(main_site(own_sites), of_packed_nodes) for name, own_sites in sites.by_name.items()}


def fingerprint(digests: dict[str, str]) -> str:
    """One hash of all weights, independent of their order."""
    return hash_parts(digests.items())


def names_digest(sites: Sites) -> str:
    """A hash of all weights' names and quantisation. Only graphs that agree in it have comparable fingerprints."""
    kinds = {name: quantisation_of(main_site(own_sites)) for name, own_sites in sites.by_name.items()}
    return hash_parts(f"{name}, {kind}" if kind else name for name, kind in kinds.items())


def main_site(sites: Sequence[Site]) -> Site:
    """The first linear site, or the first one."""
    return min(sites, key=lambda site: not site.is_linear)


def quantisation_of(site: Site) -> str:
    """How the weight is quantised, in words. Empty where it is not."""
    return site.quantised.kind if site.quantised is not None else ""


def _weight_digest(site: Site, of_packed_nodes: dict[ir.Node, str]) -> str:
    if site.quantised is None:
        return _hash_arrays([np.ascontiguousarray(site.matrix)])
    node = site.quantised.node
    if node not in of_packed_nodes:
        # Inputs after these are no part of the weight: DoRA removes the bias.
        tensors = [None if value is None else ir.convenience.get_const_tensor(value) for value in node.inputs[:4]]
        of_packed_nodes[node] = _hash_arrays([tensor.numpy() for tensor in tensors if tensor is not None])
    block = site.block and (site.block.start, site.block.stop)
    return hash_parts([of_packed_nodes[node], quantisation_of(site), site.stored_shape, block])


def _hash_arrays(arrays: Iterable[NDArray[Any]]) -> str:
    digest = ALGORITHMS[FAST]()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_parts(parts: Iterable[object]) -> str:
    """One hash of all parts, independent of their order."""
    digest = ALGORITHMS[FAST]()
    for part in sorted(map(repr, parts)):
        digest.update(part.encode())
    return digest.hexdigest()


def checked_contract(model: ir.Model, source: Path) -> Contract:
    """The contract of a graph with inputs for adapters, with each place's dtype as it is now. Reads all base weights.

    Raises InputRefused, with all problems, where an input is missing or has another shape than in the contract, and
    where the base's weights changed after the inputs were added. What cannot be compared is accepted: a graph that was
    converted to another dtype, weights that were quantised since, and weights without an adapter that have lost their
    names.
    """
    contract = read_contract(model.metadata_props, source)
    sites = _base_sites(model, contract)
    digests = weight_digests(sites)
    inputs = {value.name: value for value in model.graph.inputs}
    dtypes = [(place, inputs[place.a].dtype if place.a in inputs else None) for place in contract.places]
    places = [place if dtype is None else replace(place, dtype=str(dtype.numpy())) for place, dtype in dtypes]
    problems = [*_input_problems(inputs, contract), *_weight_problems(contract, places, sites, digests)]
    same_dtype = all(now.dtype == place.dtype for now, place in zip(places, contract.places, strict=True))
    same_names = names_digest(sites) == contract.names
    if not problems and same_dtype and same_names and fingerprint(digests) != contract.base:
        problems.append("weights without an adapter differ from those when the inputs were added")
    if problems:
        raise InputRefused(f"{source} does not agree with its own record of inputs for adapters:", listed(problems))
    return replace(contract, places=tuple(places))


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
    for place in contract.places:
        if place.weight not in by_name and place.value in values:
            block = None if place.block is None else range(*place.block)
            readers = find_readers(values[place.value], model.functions)
            own_sites = tuple(
                replace(site, name=place.weight, block=block) for site in readers if _fits(site, place, block)
            )
            by_name |= {place.weight: own_sites} if own_sites else {}
    return replace(sites, by_name=by_name)


def _fits(site: Site, place: AdapterPlace, block: range | None) -> bool:
    """Whether a site has the shape of the weight in a place."""
    if place.embedding or len(place.shape) > 2 or not site.is_linear:
        return site.layout is place.spec.layout and site.stored_shape == place.spec.shape
    shape = site.stored_shape[::-1] if site.layout is Layout.IN_OUT else site.stored_shape
    out = len(block) if block is not None and block.stop <= shape[0] else shape[0]
    return (out, *shape[1:]) == place.shape


def _input_problems(inputs: Mapping[str | None, ir.Value], contract: Contract) -> Iterator[str]:
    """What is wrong with the inputs of the places."""
    shapes = contract.input_shapes
    for place in contract.every_place:
        values = {name: inputs[name] for name in place.input_shapes if name in inputs}
        kind = "" if contract.required else "optional "
        yield from (f"{name}: no {kind}input of that name" for name in place.input_shapes if name not in inputs)
        if len(values) == len(place.input_shapes):
            yield from _shape_problems(place, values, shapes, is_required=contract.required)


def _shape_problems(
    place: AdapterPlace | HeadPlace,
    values: Mapping[str, ir.Value],
    shapes: Mapping[str, Sequence[int | None]],
    *,
    is_required: bool,
) -> Iterator[str]:
    weight, first = " x ".join(map(str, place.shape)), next(iter(values.values()))
    for name, value in values.items():
        sizes, wanted = list(value.shape or ()), shapes[name]
        pairs = list(zip(wanted, sizes, strict=False))
        has_fixed_rank = any(size is None and isinstance(actual, int) for size, actual in pairs)
        if len(sizes) != len(wanted) or any(size is not None and size != actual for size, actual in pairs):
            yield f"{name}: has the shape {value.shape}, its weight is {weight}"
        elif has_fixed_rank or not (value.is_initializer() or is_required):
            yield f"{name}: its rank is fixed, or it has no default"
        elif value.dtype != first.dtype:
            yield f"{name}: is {value.dtype}, {first.name} is {first.dtype}"


def _weight_problems(
    contract: Contract, places: Sequence[AdapterPlace], sites: Sites, digests: Mapping[str, str]
) -> Iterator[str]:
    """The weights of places that have changed since their inputs were added, where they can be compared."""
    kinds = {name: quantisation_of(main_site(own_sites)) for name, own_sites in sites.by_name.items()}
    for now, place in zip(places, contract.places, strict=True):
        is_comparable = now.dtype == place.dtype and kinds.get(place.weight, place.quantised) == place.quantised
        if is_comparable and digests.get(place.weight, place.digest) != place.digest:
            yield f"{place.weight}: differs from the weight for which the inputs were added"
