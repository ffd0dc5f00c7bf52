"""Mode `slots`: as `rows`, but the adapters are inputs, so that one is replaced while the graph is in use.

Each input is a stack (slots + 1, ...), and `adapter_ids` selects an entry of it for each row of the batch. Entry 0 is
the base's: zeros, and ones for factors. Nothing in the graph depends on how many slots hold an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.formats.contract import AdapterPlace, Contract, HeadPlace
from lora_export.formats.onnx_adapter import cast_factor
from lora_export.graph.find_sites import Sites
from lora_export.graph.insert.adapter_inputs import fingerprint, names_digest, places_of, weight_digests
from lora_export.graph.insert.adapter_names import DORA_FACTOR, LORA_A, LORA_B, SCALE, dotted, module_of
from lora_export.graph.insert.adapter_rows import RowInsertion, inserter_of_rows, refuse_without_rows
from lora_export.graph.insert.node_factory import Factor, NodeFactory, NodeList, sizes_of
from lora_export.graph.insert.row_heads import SAVED_WHOLE, HeadLayer, HeadOutputs, HeadStacks, head_layers
from lora_export.graph.site import common_dtype
from lora_export.graph.values import unused_name
from lora_export.options.export import OnnxOptions
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.plan.own_heads import Head
from lora_export.provenance import SLOTS_KEY


def insert_slots(
    model: ir.Model,
    sites: Sites,
    weights: Iterable[str],
    plan: Plan | None = None,
    *,
    slots: int,
    max_rank: int,
    names: str = OnnxOptions.names,
    dora: Iterable[str] = (),
    scaled: Iterable[str] = (),
    heads: Sequence[Head] = (),
    batch: str = "batch",
    per_row: int = 1,
) -> Contract:
    """Let each row of a batch choose one of so many adapters, which are inputs of the graph, in memory.

    A is (slots + 1, in, max_rank) and B (slots + 1, max_rank, out) of each of these weights; see `AdapterPlace` for
    embeddings and convolutions. The weights in `dora` also have a factor of each output, those in `scaled` one of each
    input. `heads` are the layers that the adapters of `plan` bring whole: a later adapter may have such a layer, with
    at most as many labels. `batch`, `adapter_ids` and `per_row` are as in `insert_rows`. The returned contract, with
    what a slot takes, is stored in the graph's metadata. `sites` is invalid afterwards.

    Reads all weights of the base for their fingerprint. Raises InputRefused as `insert_rows` does, but for the numbers
    of adapters: the graph holds none. The graph is then partly changed and must not be used.
    """
    inserter = inserter_of_rows(model, "slots", per_row)
    if plan is not None:
        refuse_without_rows(plan, heads, per_row)
    digests = weight_digests(sites)
    own: dict[str, Any] = {"names": names, "dora": dora, "scaled": scaled, "max_rank": max_rank}
    places, sites_by_weight = {}, {}
    for place, own_sites in places_of(inserter, sites, weights, digests, **own, apart=True):
        places[place.weight], sites_by_weight[place.weight] = place, own_sites
    insertion = RowInsertion(inserter, sites_by_weight, head_layers(inserter, sites, heads), batch)
    base, name_hash = fingerprint(digests), names_digest(sites)
    outputs = insertion.insert(
        slots,
        per_row,
        lambda weight: SlotStacks(inserter.factory, places[weight], slots),
        lambda row_heads, layer: _head_stacks(row_heads.factory, layer, slots),
        by_copies=True,
    )
    contract = Contract(base, name_hash, tuple(places.values()), True, slots, per_row, tuple(map(_head_place, outputs)))
    model.metadata_props[SLOTS_KEY] = str(contract)
    return contract


class SlotStacks:
    """Inputs of the graph that take the factors of all slots for one weight."""

    def __init__(self, factory: NodeFactory, place: AdapterPlace, slots: int):
        self.factory, self.place, self.entries = factory, place, slots + 1
        parts = {place.a: LORA_A, place.b: LORA_B, place.factor: DORA_FACTOR, place.scale: SCALE}
        module = module_of(place.weight)
        self.inputs = {
            parts[name]: _stack(factory, module, parts[name], name, (self.entries, *map(_fixed, shape)), place.dtype)
            for name, shape in place.input_shapes.items()
        }

    def pairs(self) -> tuple[Factor, Factor]:
        """A (slots + 1, in, rank) and B (slots + 1, rank, out). An embedding's A is one table of all slots."""
        a, b, place = self.inputs[LORA_A], self.inputs[LORA_B], self.place
        return (self._reshaped(a, self.entries * place.shape[1], place.max_rank) if place.embedding else a), b

    def convolutions(self) -> tuple[Factor, Factor]:
        """A (ranks, in, kernel) and B (out, ranks, 1...), the ranks of all slots concatenated."""
        a, b, (out, *inner) = self.inputs[LORA_A], self.inputs[LORA_B], self.place.shape
        ranks, ones = self.entries * self.place.max_rank, [1] * (len(inner) - 1)
        return self._reshaped(a, ranks, *inner), self._reshaped(b, out, ranks, *ones, by_output=True)

    def rank_mask(self) -> NDArray[np.bool_]:
        """Which of the concatenated ranks belong to each slot: (slots + 1, ranks)."""
        return np.repeat(np.eye(self.entries, dtype=np.bool_), self.place.max_rank, axis=1)

    def of_outputs(self) -> Factor | None:
        """The factors of outputs (slots + 1, out)."""
        return self._flat(DORA_FACTOR, self.place.shape[0])

    def of_inputs(self) -> Factor | None:
        """The factors of inputs (slots + 1, in)."""
        return self._flat(SCALE, self.place.shape[1])

    def _flat(self, part: str, size: int) -> Factor | None:
        if part not in self.inputs or len(self.place.shape) == 2:
            return self.inputs.get(part)
        return self._reshaped(self.inputs[part], self.entries, size)

    def _reshaped(self, stack: Factor, *shape: int, by_output: bool = False) -> Factor:
        """A stack in another shape; `by_output` exchanges its first two dimensions before."""
        nodes, value, graph = NodeList(self.factory, stack.path), stack.value, self.factory.model.graph
        if by_output:
            entries, out, *others = sizes_of(value)
            value = nodes.add("Transpose", [value], [out, entries, *others], perm=[1, 0, *range(2, 2 + len(others))])
        constant = self.factory.constant(stack.path, "shape", np.array(shape, np.int64))
        value = nodes.add("Reshape", [value, constant], shape)
        graph.insert_before(graph[0], nodes.nodes)
        return stack._replace(value=value)


def _fixed(size: int | None) -> int:
    assert size is not None  # the rank is fixed
    return size


def _stack(factory: NodeFactory, module: str, part: str, name: str, shape: Sequence[int], dtype: str) -> Factor:
    """A new input of the graph. Raises InputRefused where it has one of that name."""
    if name in factory.value_names:
        raise InputRefused(f"the graph has an input or value {name} already: start from the graph without adapters")
    kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    value = ir.Value(name=unused_name(name, factory.value_names), shape=ir.Shape(shape), type=kind)
    factory.model.graph.inputs.append(value)
    return Factor(value, "/" + "/".join(filter(None, (module, part))))


def _head_stacks(factory: NodeFactory, layer: HeadLayer, slots: int) -> HeadStacks:
    """The inputs that take a whole layer."""
    place = _head_place(HeadOutputs(layer, (), False))
    w, b, used = (
        _stack(factory, layer.module, SAVED_WHOLE, name, (slots + 1, *shape), place.dtype)
        for name, shape in place.input_shapes.items()
    )
    nodes = NodeList(factory, used.path)
    owners = nodes.cast(used.value, ir.DataType.BOOL)
    factory.model.graph.insert_before(factory.model.graph[0], nodes.nodes)
    return HeadStacks(w, b, owners)


def _head_place(found: HeadOutputs) -> HeadPlace:
    layer = found.layer
    w, b, used = (dotted(layer.module, SAVED_WHOLE, part) for part in ("weight", "bias", "used"))
    return HeadPlace(
        dotted(layer.module, "weight"),
        *(w, b, used),
        features=layer.sites[0].matrix.shape[1],
        labels=layer.width,
        base_labels=layer.base_labels,
        dtype=common_dtype(layer.sites),
        outputs=found.names,
        narrower=found.is_clear,
    )


def head_values(contract: Contract, sites: Sites, adapter: str, head: Head) -> dict[str, NDArray[Any]]:
    """The values of a slot's inputs for the layers that an adapter brings whole.

    `sites` are those of the graph. Where the adapter has one of weight and bias, the other is the base's. Raises
    InputRefused, with all of them, for layers that the graph does not take, and for other numbers of labels.
    """
    values: dict[str, NDArray[Any]] = {}
    places = {place.weight: place for place in contract.heads}
    problems = []
    for weight in dict.fromkeys(dotted(module_of(name.removesuffix(".bias")), "weight") for name in head):
        place, bias = places.get(weight), dotted(module_of(weight), "bias")
        if place is None:
            problems.append(f"{adapter}, {weight}: the graph takes no such layer")
            continue
        own = head[weight] if weight in head else sites.by_name[weight][0].matrix
        added = head[bias] if bias in head else sites.by_name[bias][0].array if bias in sites.by_name else None
        if len(own) > place.labels or (len(own) < place.labels and not place.narrower):
            most = f"{place.labels}" if not place.narrower else f"at most {place.labels}"
            problems.append(f"{adapter}, {weight}: {len(own)} labels, the graph takes {most}")
            continue
        parts = place.values(own, added)
        values |= {name: cast_factor(f"{adapter}, {weight}", name, one, place.dtype) for name, one in parts.items()}
    if problems:
        raise InputRefused(
            "a slot takes the layers of the adapters that the graph was made with; these do not fit:",
            listed(problems),
            f"Export again with this adapter ({named('adapters')})",
        )
    return values
