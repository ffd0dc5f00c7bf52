"""Places for adapters in a graph: A and B as optional inputs that onnxruntime fills from an adapter's file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused, one_line
from lora_export.formats.onnx_adapter import CONTRACT_KEY, AdapterSlot, Contract, read_contract
from lora_export.graph.insert.dora import length_factors
from lora_export.graph.insert.inserter import Factor, Inserter, module_of
from lora_export.graph.readers import common_dtype, readers
from lora_export.graph.sites import Site, Sites, find
from lora_export.plan import Layout, Plan
from lora_export.storage.hashes import ALGORITHMS

SHOWN = 20  # problems that an error lists
LOWEST_IR = 4  # before it, whatever has a value had to be an input, and none was optional
FACTOR = "lora_magnitude_vector"


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _as_olive(module: str, part: str, _: bool) -> str:
    return _dotted(module, part, "weight")


def _as_genai(module: str, part: str, _: bool) -> str:
    module = re.sub(r"\bself_attn\b", "attn", module)
    return _dotted(module, part, "weight") if part == FACTOR else _dotted(module, part, "MatMul", "weight")


def _as_peft(module: str, part: str, embedding: bool) -> str:
    if embedding and part != FACTOR:
        return _dotted("base_model.model", module, part.replace("lora_", "lora_embedding_"))
    return _dotted("base_model.model", module, part, *([] if part == FACTOR else ["weight"]))


# Whose conventions the inputs' names follow: (module, "lora_A", whether it is an embedding) -> name.
NAMES: Mapping[str, Callable[[str, str, bool], str]] = {
    # Olive's `convert-adapters`: the module's own name
    "olive": _as_olive,
    # onnxruntime-genai's model builder, and Olive's `extract-adapters`
    "genai": _as_genai,
    # the key in a PEFT adapter's file
    "peft": _as_peft,
}


def open_inputs(
    model: ir.Model, sites: Sites, weights: Iterable[str], *, names: str = "olive", dora: Iterable[str] = ()
) -> Contract:
    """Give these weights' layers A and B as optional inputs, in memory; see `AdapterSlot` for their shapes.

    Each is an input and an initializer of one name. The initializer's rank is 0 (a convolution's is one
    of zeros), so that without an adapter the layer gains zeros and the graph computes what it did; each
    place's rank has a symbol of its own, so that an adapter's ranks may differ. The weights in `dora` also
    take the factor of each output, by default ones, by which the sum is multiplied before the bias is
    added. What the inputs are called, for which base they were made and where they are stands in the
    graph's metadata, and is returned. `sites` does not describe the graph any more then.

    Reads all the base's weights, for their fingerprint. Raises InputRefused where a weight is also
    read by something that is no layer of its kind, where the graph has an input of the name already,
    and for a graph in an IR version that knows no optional inputs; throw the graph away then.
    """
    if model.ir_version < LOWEST_IR:
        raise InputRefused(f"the graph is in IR version {model.ir_version}, which knows no optional inputs: convert it")
    if CONTRACT_KEY in model.metadata_props:
        raise InputRefused("the graph takes adapters already: start from the graph that does not")
    digests, with_factor = _digests(sites), set(dora)
    inserter, places = Inserter(model), []
    for weight in weights:
        embedding = all(site.layout is Layout.EMBEDDING for site in sites.by_name[weight])
        there = inserter.places(weight, sites, embedding=embedding, in_place=True)
        place = _place(weight, there, NAMES[names], digests[weight], embedding=embedding, dora=weight in with_factor)
        a, b, *factor = _opened(inserter, place)
        for site in there:
            inserter.put(site, [(a, b)], inserter.rescaling(site, factor[0]) if factor else None)
        places.append(place)
    inserter.finish()
    contract = Contract(_hash(digests.items()), _hash(_spoken(sites)), tuple(places))
    model.metadata_props[CONTRACT_KEY] = str(contract)
    return contract


def _place(
    weight: str,
    there: Sequence[Site],
    name: Callable[[str, str, bool], str],
    digest: str,
    *,
    embedding: bool,
    dora: bool,
) -> AdapterSlot:
    site, module = there[0], module_of(weight)
    return AdapterSlot(
        weight,
        a=name(module, "lora_A", embedding),
        b=name(module, "lora_B", embedding),
        shape=site.shape[::-1] if embedding or site.layout is Layout.IN_OUT else site.shape,
        dtype=common_dtype(there),
        digest=digest,
        factor=name(module, FACTOR, embedding) if dora else "",
        embedding=embedding,
        value=site.value.name or "",
        block=(site.block.start, site.block.stop) if site.block is not None else None,
        quantised=_kind(site),
    )


def _opened(inserter: Inserter, place: AdapterSlot) -> list[Factor]:
    """A place's inputs: A, B, and the factor where it takes one."""
    module = module_of(place.weight)
    # Its own symbol: onnxruntime lets tensors of equal symbols share memory.
    rank = _dotted(module, "lora_r")
    opened = []
    for part, (name, array) in zip(("lora_A", "lora_B", FACTOR), place.without_adapter().items(), strict=False):
        factor = inserter.factor(module, part, array, name=name)
        factor.value.shape = ir.Shape([rank if size is None else size for size in place.input_shapes[name]])
        inserter.model.graph.inputs.append(factor.value)
        opened.append(factor)
    return opened


# --- fingerprints -------------------------------------------------------------------------------


def _spoken(sites: Sites) -> Iterator[str]:
    """The names of all weights, and how they are quantised: what has to be alike for contents to be compared."""
    for name, there in sites.by_name.items():
        kind = _kind(_main(there))
        yield f"{name}, {kind}" if kind else name


def _main(there: Sequence[Site]) -> Site:
    return min(there, key=lambda site: not site.is_linear)


def _kind(site: Site) -> str:
    return site.quantised.kind if site.quantised is not None else ""


def _digests(sites: Sites) -> dict[str, str]:
    """Every named weight, and a hash of its contents as the model has them, however the graph stores them.

    Of a quantised weight it is what is stored that is hashed: integers, scales and zero points, and its neighbours'
    too where several lie in one.
    """
    packed: dict[ir.Node, str] = {}
    return {name: _digest(_main(there), packed) for name, there in sites.by_name.items()}


def _digest(site: Site, packed: dict[ir.Node, str]) -> str:
    if site.quantised is None:
        return _hashed([np.ascontiguousarray(site.matrix)])
    node = site.quantised.node
    if node not in packed:
        # Not a bias, which comes behind: DoRA takes it out.
        tensors = [None if value is None else ir.convenience.get_const_tensor(value) for value in node.inputs[:4]]
        packed[node] = _hashed([tensor.numpy() for tensor in tensors if tensor is not None])
    own = site.block and (site.block.start, site.block.stop)
    return _hash([packed[node], _kind(site), site.whole, own])


def _hashed(arrays: Iterable[NDArray[Any]]) -> str:
    value = ALGORITHMS["xxh3_128"]()
    for array in arrays:
        value.update(f"{array.dtype} {array.shape}".encode())
        value.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return value.hexdigest()


def _hash(parts: Iterable[object]) -> str:
    """One hash of all these, in whatever order they come."""
    value = ALGORITHMS["xxh3_128"]()
    for part in sorted(map(repr, parts)):
        value.update(part.encode())
    return value.hexdigest()


# --- graphs that have their inputs already ------------------------------------------------------


def contract_of(model: ir.Model, source: Path) -> Contract:
    """The contract of a graph with inputs for adapters, checked against the graph as it is now.

    Raises InputRefused, with all of it, where an input is gone or has another shape than the contract
    says, and where the base's weights were changed after the inputs were made. What cannot be compared
    is believed: a graph converted to another dtype, weights that were quantised since, and those that
    have lost their names, unless an adapter stands beside them. Each place's dtype is the input's.
    Reads all the base's weights.
    """
    contract = read_contract(model.metadata_props, source)
    inputs = {value.name: value for value in model.graph.inputs}
    sites = _base(model, contract)
    digests, kinds = _digests(sites), {name: _kind(_main(there)) for name, there in sites.by_name.items()}
    problems: list[str] = []
    places: list[AdapterSlot] = []
    for place in contract.slots:
        values = {name: inputs[name] for name in place.input_shapes if name in inputs}
        problems += [f"{name}: no optional input of that name" for name in place.input_shapes if name not in inputs]
        problems += _changed(place, values) if len(values) == len(place.input_shapes) else []
        dtype = values[place.a].dtype if place.a in values else None
        now = place if dtype is None else replace(place, dtype=str(dtype.numpy()))
        places.append(now)
        alike = now.dtype == place.dtype and kinds.get(place.weight, place.quantised) == place.quantised
        if alike and digests.get(place.weight, place.digest) != place.digest:
            problems.append(f"{place.weight}: holds other numbers than when the graph was given its inputs")
    same_dtype = all(now.dtype == place.dtype for now, place in zip(places, contract.slots, strict=True))
    same_names = _hash(_spoken(sites)) == contract.names
    if not problems and same_dtype and same_names and _hash(digests.items()) != contract.base:
        problems.append("weights beside which no adapter stands hold other numbers than when it was given its inputs")
    if problems:
        more = [f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise InputRefused(
            f"{source} is not the graph any more that it says it is:\n"
            + "\n".join([*(one_line(f"  {problem}") for problem in problems[:SHOWN]), *more])
        )
    return replace(contract, slots=tuple(places))


def _base(model: ir.Model, contract: Contract) -> Sites:
    """The base's weights in a graph that has its inputs: by name, or where the contract says that they are."""
    found = find(model)
    by_name = {name: there for name, there in found.by_name.items() if name not in contract.inputs}
    values = {value.name: value for graph in model.graphs() for value in graph.initializers.values()}
    values |= {output.name: output for node in model.graph for output in node.outputs if node.op_type == "Constant"}
    for place in contract.slots:
        if place.weight not in by_name and place.value in values:
            block = None if place.block is None else range(*place.block)
            there = readers(values[place.value], model.functions)
            fits = [replace(site, name=place.weight, block=block) for site in there if _is_there(site, place, block)]
            by_name |= {place.weight: tuple(fits)} if fits else {}
    return replace(found, by_name=by_name)


def _is_there(site: Site, place: AdapterSlot, block: range | None) -> bool:
    if place.embedding or len(place.shape) > 2 or not site.is_linear:
        return site.layout is place.spec.layout and site.whole == place.spec.shape
    shape = site.whole[::-1] if site.layout is Layout.IN_OUT else site.whole
    out = len(block) if block is not None and block.stop <= shape[0] else shape[0]
    return (out, *shape[1:]) == place.shape


def _changed(place: AdapterSlot, values: Mapping[str, ir.Value]) -> list[str]:
    weight, first = " x ".join(map(str, place.shape)), values[place.a]
    problems = []
    for name, value in values.items():
        sizes = list(value.shape or ())
        wanted = place.input_shapes[name]
        pairs = list(zip(wanted, sizes, strict=False))
        if len(sizes) != len(wanted) or any(size is not None and size != there for size, there in pairs):
            problems.append(f"{name}: has the shape {value.shape}, its weight is {weight}")
        elif not value.is_initializer() or any(size is None and isinstance(there, int) for size, there in pairs):
            problems.append(f"{name}: its rank is fixed, or it has no default")
        elif value.dtype != first.dtype:
            problems.append(f"{name}: is {value.dtype}, {first.name} is {first.dtype}")
    return problems


def factors_of(model: ir.Model, contract: Contract, plan: Plan, adapter: str) -> dict[str, NDArray[np.float64]]:
    """By weight, what DoRA multiplies each output by, of the weights that the graph itself holds.

    Reads the weights that the adapter changes by DoRA. Raises InputRefused where the graph does not tell one of
    them, and as `length_factor` does.
    """
    if not any(step.has_dora for step in plan.steps):
        return {}
    sites = _base(model, contract)

    def there(weight: str) -> Sequence[Site]:
        if weight not in sites.by_name:
            raise InputRefused(
                f"{adapter}, {weight}: DoRA needs its numbers, and nothing in the graph tells where it is"
            )
        return sites.by_name[weight]

    return length_factors(plan.low_rank, adapter, there)
