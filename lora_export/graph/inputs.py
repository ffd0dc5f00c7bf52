"""Places for adapters in a graph: A and B as optional inputs that onnxruntime fills from an adapter's file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.errors import InputRefused, one_line
from lora_export.files import HASHES
from lora_export.formats.onnx_adapter import KEY, Contract, Place, read_contract
from lora_export.graph.branches import Factor, Weaver, module_of
from lora_export.graph.sites import Site, Sites, find

SHOWN = 20  # problems that an error lists
LOWEST_IR = 4  # before it, whatever has a value had to be an input, and none was optional


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)


# Whose conventions the inputs' names follow: (module, "lora_A") -> name.
NAMES: Mapping[str, Callable[[str, str], str]] = {
    # Olive's `convert-adapters`: the module's own name
    "olive": lambda module, part: _dotted(module, part, "weight"),
    # onnxruntime-genai's model builder, and Olive's `extract-adapters`
    "genai": lambda module, part: _dotted(re.sub(r"\bself_attn\b", "attn", module), part, "MatMul", "weight"),
    # the key in a PEFT adapter's file
    "peft": lambda module, part: _dotted("base_model.model", module, part, "weight"),
}


def open_inputs(model: ir.Model, sites: Sites, weights: Iterable[str], *, names: str = "olive") -> Contract:
    """Give these weights' layers A (in, rank) and B (rank, out) as optional inputs, in memory.

    Each is an input and an initializer of one name. The initializer's rank is 0, so that without an
    adapter the layer gains zeros and the graph computes what it did; each place's rank has a symbol of
    its own, so that an adapter's ranks may differ. What the inputs are called, for which base they
    were made and where they are stands in the graph's metadata, and is returned. `sites` does not
    describe the graph any more then.

    Reads all the base's weights, for their fingerprint. Raises InputRefused where a weight is also
    read by something that is no linear layer, where the graph has an input of the name already, and
    for a graph in an IR version that knows no optional inputs; throw the graph away then.
    """
    if model.ir_version < LOWEST_IR:
        raise InputRefused(f"the graph is in IR version {model.ir_version}, which knows no optional inputs: convert it")
    if KEY in model.metadata_props:
        raise InputRefused("the graph takes adapters already: start from the graph that does not")
    digests = _digests(sites)
    weaver = Weaver(model)
    places = []
    for weight in weights:
        place, pair = _open(weaver, weight, sites, NAMES[names], digests[weight])
        places.append(place)
        for site in sites.by_name[weight]:
            weaver.stand_beside(site, [weaver.low_rank(site, *pair)])
    contract = Contract(_hash(digests.items()), _hash(digests), tuple(places))
    model.metadata_props[KEY] = str(contract)
    return contract


def _open(
    weaver: Weaver, weight: str, sites: Sites, name: Callable[[str, str], str], contents: str
) -> tuple[Place, tuple[Factor, Factor]]:
    there = weaver.places(weight, sites)
    out_features, in_features = there[0].matrix.shape
    dtype = np.dtype(there[0].dtype)
    module = module_of(weight)
    sides = {"lora_A": (in_features, 0), "lora_B": (0, out_features)}
    a, b = (
        weaver.factor(module, part, np.zeros(shape, dtype), name=name(module, part)) for part, shape in sides.items()
    )
    # Its own symbol: onnxruntime lets tensors of equal symbols share memory.
    rank = _dotted(module, "lora_r")
    for value, shape in ((a.value, [in_features, rank]), (b.value, [rank, out_features])):
        value.shape = ir.Shape(shape)
        weaver.model.graph.inputs.append(value)
    assert a.value.name is not None and b.value.name is not None
    return Place(weight, a.value.name, b.value.name, (out_features, in_features), str(dtype), contents), (a, b)


def _digests(sites: Sites) -> dict[str, str]:
    """Every named weight, and a hash of its contents as the model has them, however the graph stores them."""
    return {name: _digest(min(there, key=lambda site: not site.is_linear)) for name, there in sites.by_name.items()}


def _digest(site: Site) -> str:
    value = HASHES["xxh3_128"]()
    matrix = np.ascontiguousarray(site.matrix)
    value.update(f"{matrix.dtype} {matrix.shape}".encode())
    value.update(matrix.reshape(-1).view(np.uint8).data)
    return value.hexdigest()


def _hash(parts: Iterable[object]) -> str:
    """One hash of all these, in whatever order they come."""
    value = HASHES["xxh3_128"]()
    for part in sorted(map(repr, parts)):
        value.update(part.encode())
    return value.hexdigest()


def contract_of(model: ir.Model, source: Path) -> Contract:
    """The contract of a graph with inputs for adapters, checked against the graph as it is now.

    Raises InputRefused, with all of it, where an input is gone or has another shape than the contract
    says, and where the base's weights were changed after the inputs were made. What cannot be compared
    is believed: a graph converted to another dtype, weights that lost their names or were quantised.
    Each place's dtype is the input's. Reads all the base's weights.
    """
    contract = read_contract(model.metadata_props, source)
    inputs = {value.name: value for value in model.graph.inputs}
    digests = {name: there for name, there in _digests(find(model)).items() if name not in contract.inputs}
    problems: list[str] = []
    places: list[Place] = []
    for place in contract.places:
        a, b = inputs.get(place.a), inputs.get(place.b)
        problems += [f"{name}: no optional input of that name" for name in (place.a, place.b) if name not in inputs]
        problems += [] if a is None or b is None else _changed(place, a, b)
        now = place if a is None or a.dtype is None else replace(place, dtype=str(a.dtype.numpy()))
        places.append(now)
        if now.dtype == place.dtype and digests.get(place.weight, place.digest) != place.digest:
            problems.append(f"{place.weight}: holds other numbers than when the graph was given its inputs")
    same_dtype = all(now.dtype == place.dtype for now, place in zip(places, contract.places, strict=True))
    if not problems and same_dtype and _hash(digests) == contract.names and _hash(digests.items()) != contract.base:
        problems.append("weights beside which no adapter stands hold other numbers than when it was given its inputs")
    if problems:
        more = [f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise InputRefused(
            f"{source} is not the graph any more that it says it is:\n"
            + "\n".join([*(one_line(f"  {problem}") for problem in problems[:SHOWN]), *more])
        )
    return replace(contract, places=tuple(places))


def _changed(place: Place, a: ir.Value, b: ir.Value) -> list[str]:
    out_features, in_features = place.shape
    problems = []
    for value, axis, size in ((a, 0, in_features), (b, 1, out_features)):
        if value.shape is None or len(value.shape) != 2 or value.shape[axis] != size:
            problems.append(f"{value.name}: has the shape {value.shape}, its weight is {out_features} x {in_features}")
        elif not value.is_initializer() or isinstance(value.shape[1 - axis], int):
            problems.append(f"{value.name}: its rank is fixed, or it has no default")
        elif value.dtype != a.dtype:
            problems.append(f"{value.name}: is {value.dtype}, {a.name} is {a.dtype}")
    return problems
