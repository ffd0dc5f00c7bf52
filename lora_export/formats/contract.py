"""What the metadata of a graph records of adapters: those that rows may choose, and inputs that take one."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.options.spelling import command, named
from lora_export.plan import FLOATS, Layout, TensorSpec
from lora_export.provenance import CONTRACT_KEY, ROW_ADAPTERS_KEY, SLOTS_KEY
from lora_export.storage.json_files import parse_json

ADAPTER_IDS = "adapter_ids"  # the input of such a graph: one adapter per row of the batch
ADAPTER_SCALES = "adapter_scales"  # its input where a row has several adapters: a factor for each
ROW_INPUTS = (ADAPTER_IDS, ADAPTER_SCALES)
# The logit of a label that the head of a row's adapter does not have. Every float type holds it (bfloat16 as -9984),
# and its softmax and sigmoid are 0.
ABSENT_LABEL = -10000.0


@dataclass(frozen=True)
class RowAdapters:
    """The adapters that rows may choose from, and for each output of logits how many labels each id has.

    `labels` has the output's name and one count for each id, the base's first. It is empty where no adapter has a head
    of its own. `per_row` is the number of adapters on one row.
    """

    names: Sequence[str]
    labels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    per_row: int = 1

    def __str__(self) -> str:
        """The JSON that a graph's metadata holds."""
        heads = {"labels": dict(self.labels), "absent_label": ABSENT_LABEL} if self.labels else {}
        several = {"per_row": self.per_row} if self.per_row > 1 else {}
        return json.dumps({"adapters": list(self.names), **heads, **several})

    def own_labels(self, outputs: Mapping[str, NDArray[Any]], number: int) -> dict[str, NDArray[Any]]:
        """The outputs of a batch whose rows all have this id, without the labels that its head does not have.

        An output keeps all labels where one of those that are absent has another value than ABSENT_LABEL.
        """
        counts = {name: own[number] for name, own in self.labels.items()}
        return {name: without_absent(value, counts.get(name)) for name, value in outputs.items()}


def without_absent(logits: NDArray[Any], count: int | None) -> NDArray[Any]:
    """The first `count` labels (..., labels), where all others are absent; else the logits as they are."""
    if count is None or not logits.ndim or count >= logits.shape[-1]:
        return logits
    absent = logits[..., count:]
    return logits[..., :count] if np.all(absent == np.array(ABSENT_LABEL, logits.dtype)) else logits


def read_row_adapters(metadata: Mapping[str, str], source: str) -> RowAdapters | None:
    """Read the record in a graph's metadata; None without one. Raises InputRefused where it is no JSON object."""
    if ROW_ADAPTERS_KEY not in metadata:
        return None
    record = parse_json(metadata[ROW_ADAPTERS_KEY], source)
    names = record.get("adapters", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    labels = record.get("labels", {})
    is_valid = isinstance(labels, dict) and all(
        isinstance(counts, list) and [type(count) for count in counts] == [int] * (len(names) + 1)
        for counts in labels.values()
    )
    per_row = record.get("per_row", 1)
    return RowAdapters(names, labels if is_valid else {}, per_row if type(per_row) is int and per_row > 1 else 1)


def row_inputs(ids: NDArray[np.int64], scales: NDArray[np.float32] | None, per_row: int) -> dict[str, NDArray[Any]]:
    """The graph's inputs that choose adapters. `ids` are [batch] or, with as many `scales`, [batch, per_row].

    With one id for each row of a graph that takes several, the others are those of the base.
    """
    if per_row == 1:
        return {ADAPTER_IDS: ids}
    if ids.ndim == 1:
        others = np.zeros((len(ids), per_row - 1), np.int64)
        ids, scales = np.concatenate([ids[:, None], others], axis=1), np.ones((len(ids), per_row), np.float32)
    assert scales is not None
    return {ADAPTER_IDS: ids, ADAPTER_SCALES: scales}


STRENGTHS_KEY = "lora_export.strengths"  # of the adapters whose strengths are an input
ADAPTER_STRENGTHS = "adapter_strengths"  # that input, (adapters,): a factor of each adapter's change, by default 1

AdapterArrays = Mapping[str, NDArray[Any]]  # input -> its value
NO_ARRAYS: AdapterArrays = MappingProxyType({})


@dataclass(frozen=True)
class AdapterPlace:
    """The inputs of a graph or a program that take an adapter for one weight.

    A linear layer of a graph takes A (in, rank) and B (rank, out). An embedding takes the same; `in` is its number of
    rows. With `out_in` it takes A (rank, in) and B (out, rank), as PyTorch computes with them. A convolution takes A
    (rank, in, kernel) and B (out, rank, 1...). B contains the scale.
    """

    weight: str  # the base's name of the weight
    a: str  # name of the graph's input for A
    b: str  # name of the graph's input for B
    shape: tuple[int, ...]  # (out, in, kernel) of the weight
    dtype: str
    digest: str  # of the weight's contents
    factor: str = ""  # name of the graph's input (out, 1...) for DoRA's m / ‖W + sBA‖; empty without such an input
    scale: str = ""  # name of the graph's input (in, 1...) for factors of the layer's inputs; empty without
    embedding: bool = False
    value: str = ""  # the graph's initializer that holds the weight
    block: tuple[int, int] | None = None  # the weight's output features, where the initializer holds others too
    quantised: str = ""  # how the weight is quantised, in words; empty where it is not
    max_rank: int = 0  # the rank of A and B, to which smaller ones are padded; 0: any rank
    out_in: bool = False  # whether those of a linear layer begin with outputs, as its weight does

    @property
    def spec(self) -> TensorSpec:
        shape = self.shape[::-1] if self.embedding else self.shape
        return TensorSpec(self.weight, shape, self.dtype, Layout.EMBEDDING if self.embedding else Layout.OUT_IN)

    @functools.cached_property
    def input_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shape of each input, by its name. The size of the rank is None, unless it is fixed."""
        out, inner, *kernel = self.shape
        ones, rank = (1,) * len(kernel), self.max_rank or None
        a = (rank, inner, *kernel) if kernel or self.out_in else (inner, rank)
        b = (out, rank, *ones) if kernel or self.out_in else (rank, out)
        factors = {self.factor: (out, *ones), self.scale: (inner, *ones)}
        return {self.a: a, self.b: b} | {name: shape for name, shape in factors.items() if name}

    def without_adapter(self) -> dict[str, NDArray[Any]]:
        """Return each input's value when there is no adapter: A and B of rank zero, and a factor of ones.

        A fixed rank is that of zeros. A convolution's A and B have one rank of zeros: onnxruntime's convolution over no
        channels does not set its output.
        """
        return self.zeros(1 if len(self.shape) > 2 else 0)

    def zeros(self, rank: int = 1) -> dict[str, NDArray[Any]]:
        """Return the values of an adapter of this rank that changes nothing: A and B of zeros, and a factor of ones."""
        sizes = {name: [rank if size is None else size for size in shape] for name, shape in self.input_shapes.items()}
        ones = {self.factor, self.scale}
        return {name: (np.ones if name in ones else np.zeros)(size, self.dtype) for name, size in sizes.items()}

    def rank_axis(self, name: str) -> int:
        """The axis of an input that is the rank."""
        is_a, is_operand = name == self.a, len(self.shape) == 2 and not self.out_in
        return int(is_a == is_operand)

    def oriented(self, factor: NDArray[Any]) -> NDArray[Any]:
        """Return A or B of a pair, as `Term.factors` has it, in the layout of its input."""
        return factor.T if self.out_in and factor.ndim == 2 else factor

    def padded(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Return A or B with zeros up to the fixed rank; unchanged where any rank fits."""
        sizes, axis = [(0, 0)] * array.ndim, self.rank_axis(name)
        sizes[axis] = (0, max(0, self.max_rank - array.shape[axis]))
        return np.pad(array, sizes) if self.max_rank else array


@dataclass(frozen=True)
class HeadPlace:
    """The inputs of a graph of slots that take a linear layer which adapters save whole.

    They are W (in, labels), b (labels,), and 1 where the adapter has the layer, else 0: (1,). All have one dtype.
    """

    weight: str  # the base's name of the weight
    w: str  # names of the graph's inputs
    b: str
    used: str
    features: int  # inputs of the layer
    labels: int  # of the widest head
    base_labels: int  # of the base's own
    dtype: str
    outputs: tuple[str, ...]  # the graph's outputs that have these labels
    narrower: bool  # whether a head may have fewer labels

    @property
    def shape(self) -> tuple[int, ...]:
        """(labels, in) of the widest head."""
        return self.labels, self.features

    @functools.cached_property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each input, by its name."""
        return {self.w: (self.features, self.labels), self.b: (self.labels,), self.used: (1,)}

    def without_adapter(self) -> dict[str, NDArray[Any]]:
        """Return each input's value for an adapter without this layer."""
        return {name: np.zeros(shape, self.dtype) for name, shape in self.input_shapes.items()}

    def values(self, weight: NDArray[Any], bias: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
        """Return each input's value for W (out, in) and b (out,). Labels that it does not have are ABSENT_LABEL."""
        w, b = np.zeros((self.features, self.labels)), np.full(self.labels, ABSENT_LABEL)
        w[:, : len(weight)], b[: len(weight)] = weight.T, 0 if bias is None else bias
        return {self.w: w, self.b: b, self.used: np.ones(1)}

    def count(self, values: AdapterArrays) -> int:
        """How many labels an adapter with these values has: the base's, where it has no head of its own."""
        if self.used not in values or not values[self.used].any():
            return self.base_labels
        return int(np.count_nonzero(values[self.b] != np.array(ABSENT_LABEL, self.dtype)))


@dataclass(frozen=True)
class Contract:
    """The adapter inputs of a graph, and the base that the graph holds.

    In a graph of slots, each input is a stack (slots + 1, ...). Its entry 0 is the base's, and has to stay
    `without_adapter`.
    """

    base: str  # fingerprint of all the base's weights, as hex
    names: str  # a hash of their names alone
    places: tuple[AdapterPlace, ...]
    required: bool = False  # whether the inputs have no default, so that every run has to feed them
    slots: int = 0  # adapters that a run may choose from, row by row; 0: a run has one adapter
    per_row: int = 1  # adapters of one row
    heads: tuple[HeadPlace, ...] = ()

    @property
    def version(self) -> int:
        """What an adapter's file holds of the fingerprint."""
        return version_of(self.base)

    @property
    def every_place(self) -> tuple[AdapterPlace | HeadPlace, ...]:
        """Those of weights, and those of whole layers."""
        return (*self.places, *self.heads)

    @functools.cached_property
    def inputs(self) -> dict[str, AdapterPlace | HeadPlace]:
        """The place of each input, by the input's name."""
        return {name: place for place in self.every_place for name in place.input_shapes}

    @functools.cached_property
    def input_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shape of each of the graph's inputs, that of a stack where it takes slots."""
        stacked = (self.slots + 1,) if self.slots else ()
        return {name: (*stacked, *place.input_shapes[name]) for name, place in self.inputs.items()}

    def refuse_other_inputs(self, found: Mapping[str, Sequence[Any]], graph: Path) -> None:
        """Raise InputRefused unless a graph's inputs (name -> sizes) have these shapes: a record may claim any size."""
        for (name, shape), place in zip(self.input_shapes.items(), self.inputs.values(), strict=True):
            own = tuple(size if isinstance(size, int) else None for size in found[name]) if name in found else None
            if own != shape:
                raise InputRefused(
                    f"{graph} has no input {name} of {place.dtype} {list(shape)}, as its metadata has it"
                )

    def without_adapter(self) -> dict[str, NDArray[Any]]:
        """Return the values of all inputs when there is no adapter; in a graph of slots, of one entry of each."""
        return {name: value for place in self.every_place for name, value in place.without_adapter().items()}

    def stacks(self) -> dict[str, NDArray[Any]]:
        """Return the values of all inputs of a graph of slots, whose slots are empty: (slots + 1, ...)."""
        return {
            name: np.full((self.slots + 1, *value.shape), value.flat[0], value.dtype)
            for name, value in self.without_adapter().items()
        }

    def fill(self, stacks: AdapterArrays, slot: int, values: AdapterArrays) -> None:
        """Write the values of an adapter's file into one slot of `stacks`, from 1 on. No values: the slot is empty."""
        for name, empty in self.without_adapter().items():
            stacks[name][slot] = values.get(name, empty)

    def labels(self, adapters: Sequence[AdapterArrays]) -> dict[str, list[int]]:
        """The labels of the base and of each adapter, by the graph's output of logits."""
        return {
            output: [place.base_labels, *map(place.count, adapters)] for place in self.heads for output in place.outputs
        }

    def __str__(self) -> str:
        """The JSON that a graph's metadata holds."""
        defaults = {one.name: one.default for one in fields(AdapterPlace)}
        records = [
            {key: value for key, value in asdict(place).items() if value != defaults[key]} for place in self.places
        ]
        record: dict[str, Any] = {"base": self.base, "names": self.names}
        record |= {"required": True} if self.required else {}
        if self.slots:
            heads = [asdict(place) for place in self.heads]
            record |= {"slots": self.slots, "per_row": self.per_row, "absent_label": ABSENT_LABEL, "heads": heads}
        return json.dumps({**record, "places": records})


def read_contract(metadata: Mapping[str, str], source: Path | str) -> Contract:
    """Read the contract in a graph's metadata. Raises InputRefused where there is none, or where it is damaged."""
    key = SLOTS_KEY if SLOTS_KEY in metadata else CONTRACT_KEY
    if ROW_ADAPTERS_KEY in metadata:
        raise InputRefused(
            f"{source} takes no adapters' files: its rows choose among the adapters in it. Give all of them to "
            f"`{command('onnx', lora='rows')}`, with the graph that it was made from"
        )
    if key not in metadata:
        raise InputRefused(
            f"{source} does not record where it takes adapters: it was not made with {named('lora', 'inputs')}, or it "
            f"has lost its metadata ({CONTRACT_KEY})"
        )
    record = parse_json(metadata[key], f"{source}, {key}")
    try:
        places = tuple(_place(entry) for entry in record["places"])
        contract = Contract(str(record["base"]), str(record["names"]), places, bool(record.get("required")))
        if key == SLOTS_KEY:
            slots, per_row = (operator.index(record[name]) for name in ("slots", "per_row"))
            if min(slots, per_row) < 1 or not all(place.max_rank for place in places):
                raise ValueError(f"{slots} slots, {per_row} on a row, or a rank that is not fixed")
            heads = tuple(_head(entry) for entry in record["heads"])
            contract = replace(contract, slots=slots, per_row=per_row, heads=heads)
        version_of(contract.base)
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{source}: its record of adapter inputs ({key}) is damaged: {error!r}") from error
    return contract


def _head(entry: Mapping[str, Any]) -> HeadPlace:
    weight, w, b, used, dtype = (str(entry[key]) for key in ("weight", "w", "b", "used", "dtype"))
    features, labels, base_labels = (operator.index(entry[key]) for key in ("features", "labels", "base_labels"))
    if min(features, labels, base_labels) < 1 or dtype not in FLOATS:
        raise ValueError(f"a head of {features} inputs and {labels} labels in {dtype}")
    outputs = tuple(map(str, entry["outputs"]))
    return HeadPlace(weight, w, b, used, features, labels, base_labels, dtype, outputs, bool(entry["narrower"]))


def _place(entry: Mapping[str, Any]) -> AdapterPlace:
    shape = tuple(map(operator.index, entry["shape"]))
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"a weight of shape {shape}")
    texts = {key: str(entry[key]) for key in ("weight", "a", "b", "dtype", "digest")}
    texts |= {key: str(entry[key]) for key in ("factor", "scale", "value", "quantised") if key in entry}
    if texts["dtype"] not in FLOATS:
        raise ValueError(f"a weight of {texts['dtype']}")
    start, stop = map(operator.index, entry.get("block", (0, 0)))
    max_rank = operator.index(entry.get("max_rank", 0))
    if max_rank < 0:
        raise ValueError(f"a rank of {max_rank}")
    block = (start, stop) if "block" in entry else None
    flags: dict[str, Any] = {key: bool(entry.get(key)) for key in ("embedding", "out_in")}
    return AdapterPlace(shape=shape, block=block, max_rank=max_rank, **flags | texts)


def version_of(fingerprint: str) -> int:
    """The first 31 bits of a hash: an adapter's file holds no more."""
    return int(fingerprint[:8], 16) & 0x7FFFFFFF


def read_strengths(metadata: Mapping[str, str], source: Path | str) -> list[str]:
    """The adapters whose strengths are an input of the graph, in its order; none without such an input.

    Of a graph with inputs for adapters it is the name of the input: one adapter is active at a time. Raises
    InputRefused where the record is damaged.
    """
    if STRENGTHS_KEY not in metadata:
        return []
    names = parse_json(metadata[STRENGTHS_KEY], f"{source}, {STRENGTHS_KEY}").get("adapters")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputRefused(f"{source}: its record of strengths ({STRENGTHS_KEY}) is damaged: it names no adapters")
    return names
