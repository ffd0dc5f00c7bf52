"""onnxruntime's own adapter files, and the contract between such a file and a graph that takes it.

A graph made for adapters has, at every place where one may stand, A (in, rank) and B (rank, out) as
optional inputs, and where it was made for DoRA, the factor of each output. An `.onnx_adapter` is a
FlatBuffer of tensors under those inputs' names (onnxruntime/lora/adapter_format/adapter_schema.fbs) and
two whole numbers that onnxruntime never looks at. They are used here: `model_version` is the base's
fingerprint, `adapter_version` the adapter's.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused, OutputFailed, one_line
from lora_export.lora import Adapter
from lora_export.plan import Layout, Plan, TensorSpec
from lora_export.storage import input_files, json_files

KEY = "lora_export.inputs"  # of the contract, in a graph's metadata
ROWS = "lora_export.rows"  # of the adapters' names, in a graph's metadata where each row of a batch chooses its own
IDS = "adapter_ids"  # such a graph's input
SUFFIX = ".onnx_adapter"
LIMIT = (1 << 31) - (1 << 20)  # bytes; a FlatBuffer ends at 2 GiB, names and padding included
SHOWN = 20  # misfits that an error lists
# ONNX's numbers of the types that a weight may have
ONNX_TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}

Arrays = Mapping[str, NDArray[Any]]
NO_ARRAYS: Arrays = MappingProxyType({})


@dataclass(frozen=True)
class Place:
    """One place in a graph where an adapter may stand.

    A linear layer takes A (in, rank) and B (rank, out), an embedding the same, `in` being its number of rows,
    and a convolution A (rank, in, kernel) and B (out, rank, 1...). The scale lies in B.
    """

    weight: str  # the base's name for the weight beside which it stands
    a: str  # the graph's input
    b: str
    shape: tuple[int, ...]  # (out, in, kernel) of the weight
    dtype: str
    digest: str  # of the weight's contents
    factor: str = ""  # the graph's input (out, 1...) for DoRA's m / ‖W + sBA‖; empty where it has none
    embedding: bool = False
    value: str = ""  # the graph's initializer that holds the weight
    block: tuple[int, int] | None = None  # which of its output features, where others lie beside them
    quantised: str = ""  # how it is, in words; empty where it is not

    @property
    def spec(self) -> TensorSpec:
        shape = self.shape[::-1] if self.embedding else self.shape
        return TensorSpec(self.weight, shape, self.dtype, Layout.EMBEDDING if self.embedding else Layout.OUT_IN)

    @property
    def takes(self) -> dict[str, tuple[int | None, ...]]:
        """What shape each of its inputs has; the rank's size is None."""
        out, inner, *kernel = self.shape
        ones = (1,) * len(kernel)
        shapes: dict[str, tuple[int | None, ...]]
        shapes = {self.a: (None, inner, *kernel), self.b: (out, None, *ones)}
        if not kernel:
            shapes = {self.a: (inner, None), self.b: (None, out)}
        return shapes | ({self.factor: (out, *ones)} if self.factor else {})

    def bare(self) -> dict[str, NDArray[Any]]:
        """What each of its inputs holds where there is no adapter: A and B of rank zero, and a factor of ones.

        A convolution's have one rank of zeros: over no channels at all, onnxruntime's leaves what it returns unset.
        """
        rank = 1 if len(self.shape) > 2 else 0
        sizes = {name: [rank if size is None else size for size in shape] for name, shape in self.takes.items()}
        return {name: (np.ones if name == self.factor else np.zeros)(size, self.dtype) for name, size in sizes.items()}

    def ranks_of(self, name: str) -> int:
        """The axis of an input that is the rank."""
        return self.takes[name].index(None)


@dataclass(frozen=True)
class Contract:
    """Where a graph takes adapters, and which base it holds."""

    base: str  # fingerprint of all the base's weights, as hex
    names: str  # a hash of their names alone
    places: tuple[Place, ...]

    @property
    def version(self) -> int:
        """31 bits of the fingerprint, which is what an adapter's file has room for."""
        return _31_bits(self.base)

    @property
    def inputs(self) -> dict[str, Place]:
        return {name: place for place in self.places for name in place.takes}

    def __str__(self) -> str:
        """As it stands in a graph's metadata."""
        defaults = {one.name: one.default for one in fields(Place)}
        places = [
            {key: value for key, value in asdict(place).items() if value != defaults[key]} for place in self.places
        ]
        return json.dumps({"base": self.base, "names": self.names, "places": places})


def read_contract(metadata: Mapping[str, str], source: Path | str) -> Contract:
    """The contract in a graph's metadata. Raises InputRefused where there is none, or it is damaged."""
    if KEY not in metadata:
        raise InputRefused(
            f"{source} does not say where it takes adapters: it was not made by `lora-export onnx --lora inputs`, or "
            f"has lost its metadata ({KEY})"
        )
    record = json_files.parse_json(metadata[KEY].encode(), f"{source}, {KEY}")
    try:
        places = tuple(_place(entry) for entry in record["places"])
        contract = Contract(str(record["base"]), str(record["names"]), places)
        _31_bits(contract.base)
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{source}: its record of the places for adapters ({KEY}) is damaged: {error!r}") from error
    return contract


def _place(entry: Mapping[str, Any]) -> Place:
    shape = tuple(map(operator.index, entry["shape"]))
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"a weight of shape {shape}")
    texts = {key: str(entry[key]) for key in ("weight", "a", "b", "dtype", "digest")}
    texts |= {key: str(entry[key]) for key in ("factor", "value", "quantised") if key in entry}
    block = None
    if "block" in entry:
        start, stop = map(operator.index, entry["block"])
        block = start, stop
    return Place(shape=shape, embedding=bool(entry.get("embedding")), block=block, **texts)


def _31_bits(fingerprint: str) -> int:
    return int(fingerprint[:8], 16) & 0x7FFFFFFF


# --- an adapter as such a file holds it ---------------------------------------------------------


def refuse_what_no_input_carries(adapters: Sequence[Adapter]) -> None:
    """Raise InputRefused for adapters that hold more than low-rank pairs, naming what."""
    told = []
    for adapter in adapters:
        bad = [f"{name}: a whole tensor" for name in adapter.replaced]
        bad += [f"{name}: a change of a bias" for name in adapter.biases]
        bad += [f"{name}: rows of tokens" for name in adapter.token_rows]
        told += [one_line(f"  {adapter.name}, {line}") for line in bad]
    if told:
        more = [f"  and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
        raise InputRefused(
            "low-rank pairs can be swapped while a graph runs; these cannot:\n"
            + "\n".join([*told[:SHOWN], *more])
            + "\nMerge such an adapter into a graph of its own (--lora merged). Nothing was written."
        )


def refuse_dora_without_a_place(contract: Contract, plan: Plan) -> None:
    """Raise InputRefused, with every such weight, where an adapter has DoRA and the graph no input for its factor."""
    with_factor = {place.weight for place in contract.places if place.factor}
    lacking = [
        one_line(f"  {term.adapter}, {step.weight}")
        for step in plan.low_rank
        for term in step.terms
        if term.pair.magnitude is not None and step.weight not in with_factor
    ]
    if lacking:
        more = [f"  and {len(lacking) - SHOWN} more"] if len(lacking) > SHOWN else []
        raise InputRefused(
            "the graph has no input for DoRA's factor at these weights:\n"
            + "\n".join([*lacking[:SHOWN], *more])
            + "\nA graph has one where an adapter with DoRA was given when it was made, or `onnx --lora inputs --dora` "
            "was said. Nothing was written."
        )


def parameters(contract: Contract, plan: Plan, adapter: str, factors: Arrays = NO_ARRAYS) -> dict[str, NDArray[Any]]:
    """What one adapter of a plan gives to the graph's inputs: A, and B times its scale, and DoRA's factors.

    Two pairs of one adapter that land on one weight stand side by side in the rank. `factors` are, by weight,
    what `graph.dora` made of the adapter's magnitudes; where an adapter has none, it gives ones. Raises
    InputRefused where the graph's dtype cannot hold a value, and for DoRA where the graph does not take it.
    """
    refuse_dora_without_a_place(contract, plan)
    by_weight = {place.weight: place for place in contract.places}
    given: dict[str, NDArray[Any]] = {}
    for step in plan.low_rank:
        own = step.for_adapter(adapter)
        if own is None:
            continue
        place = by_weight[step.weight]
        sides: dict[str, NDArray[Any]] = {
            name: np.concatenate(arrays, axis=place.ranks_of(name))
            for name, *arrays in zip((place.a, place.b), *(term.factors for term in own.terms), strict=True)
        }
        if place.factor:
            sides[place.factor] = place.bare()[place.factor] if own.magnitude is None else factors[step.weight]
        for name, array in sides.items():
            given[name] = stored(f"{adapter}, {step.weight}", name, array, place.dtype)
    return given


def stored(what: str, name: str, array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A factor in the graph's dtype. Raises InputRefused where that cannot hold a value."""
    kind = np.dtype(dtype)
    with np.errstate(over="ignore"):  # looked for below
        cast = np.ascontiguousarray(array.astype(kind))
    bad = cast.size - np.count_nonzero(np.isfinite(cast))
    if bad:
        raise InputRefused(
            f"{what}: {bad} values of {name} would not be finite: the largest {dtype} is "
            f"{float(ml_dtypes.finfo(kind).max):g}. Look at the adapter's scale"
        )
    return cast


# --- files --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OnnxAdapter:
    """An adapter file in memory."""

    values: Mapping[str, Any]  # input -> OrtValue; its memory is the file's
    model_version: int
    adapter_version: int
    file: Any = field(repr=False)  # onnxruntime's AdapterFormat, which owns that memory


def write(path: Path, given: Arrays, contract: Contract, *, sha256: str) -> None:
    """Write one adapter into a folder that is the caller's to publish.

    `given` is what `parameters` made; `sha256` is the adapter's own. Raises OutputFailed where the file
    cannot be written, InputRefused for 2 GiB and more.
    """
    size = sum(array.nbytes for array in given.values())
    if size > LIMIT:
        raise InputRefused(f"the adapter has {size:,} bytes, and onnxruntime's format ends at {LIMIT:,}")
    ort = onnxruntime()
    values = {name: _ort_value(ort, array) for name, array in given.items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(_31_bits(sha256 or "0"))
    file.set_model_version(contract.version)
    file.set_parameters(values)
    try:
        file.export_adapter(str(path))
    except (RuntimeError, UnicodeError) as error:
        raise OutputFailed(f"{path} could not be written: {str(error).splitlines()[0]}") from error


def read(path: Path) -> OnnxAdapter:
    """Read an adapter file whole. Raises InputRefused for anything else."""
    input_files.must_be_regular(path)
    try:
        file = onnxruntime().AdapterFormat.read_adapter(str(path))
        values = file.get_parameters()
        versions = file.get_model_version(), file.get_adapter_version()
    except (RuntimeError, UnicodeError) as error:
        raise InputRefused(f"{path} is no adapter in onnxruntime's format, or a damaged one") from error
    return OnnxAdapter(values, *versions, file=file)


def refuse_misfits(adapter: OnnxAdapter, contract: Contract, *, source: Path | str, graph: Path | str) -> None:
    """Raise InputRefused, with every misfit, where an adapter's file is not one for this graph."""
    misfits = list(_misfits(adapter, contract))
    if misfits:
        more = [f"  and {len(misfits) - SHOWN} more"] if len(misfits) > SHOWN else []
        lines = [one_line(f"  {misfit}") for misfit in misfits[:SHOWN]]
        raise InputRefused(
            f"{source} is no adapter for {graph}:\n" + "\n".join([*lines, *more]) + "\n`lora-export convert --for "
            "MODEL.onnx` makes one out of the adapter that was trained"
        )


def _misfits(adapter: OnnxAdapter, contract: Contract) -> Iterator[str]:
    if adapter.model_version != contract.version:
        yield f"it was made for another base (fingerprint {adapter.model_version}, the graph has {contract.version})"
    if not adapter.values:
        yield "it is empty"
    for name in adapter.values:
        if name not in contract.inputs:
            yield f"{name}: the graph has no such input for an adapter"
    for place in contract.places:
        there = {name: adapter.values[name] for name in place.takes if name in adapter.values}
        for name in place.takes:
            if there and name not in there:
                yield f"{name}: missing, though {next(iter(there))} is there"
        for name, value in there.items():
            if value.element_type() != ONNX_TYPES[place.dtype]:
                yield f"{name}: {value.data_type()}, the graph takes {place.dtype}"
        if len(there) == len(place.takes):
            yield from _shape_misfits(place, {name: list(value.shape()) for name, value in there.items()})


def _shape_misfits(place: Place, shapes: Mapping[str, list[int]]) -> Iterator[str]:
    for name, shape in shapes.items():
        wanted = place.takes[name]
        if len(shape) != len(wanted) or any(size not in (None, own) for size, own in zip(wanted, shape, strict=True)):
            sizes = ["rank" if size is None else str(size) for size in wanted]
            yield f"{name}: {shape}, the graph takes [{', '.join(sizes)}]"
            return
    a, b = (shapes[name][place.ranks_of(name)] for name in (place.a, place.b))
    if a != b:
        yield f"{place.a} {shapes[place.a]} and {place.b} {shapes[place.b]}: the ranks disagree"


def as_array(value: Any) -> NDArray[Any]:
    """The contents of an OrtValue on the CPU; bfloat16 too, which onnxruntime does not turn into an array."""
    if value.element_type() != ONNX_TYPES["bfloat16"]:
        array: NDArray[Any] = value.numpy()
        return array
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, ml_dtypes.bfloat16)
    words = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    halves: NDArray[Any] = np.array(words, np.uint16).view(ml_dtypes.bfloat16)
    return halves.reshape(shape)


def _ort_value(ort: Any, array: NDArray[Any]) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ONNX_TYPES["bfloat16"])
    return ort.OrtValue.ortvalue_from_numpy(array)


def onnxruntime() -> Any:
    """The package, when it is needed. Raises EnvironmentLacking where it cannot be imported."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise EnvironmentLacking(f"onnxruntime cannot be imported ({error}): pip install onnxruntime-gpu") from error
