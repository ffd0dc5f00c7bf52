"""onnxruntime's own adapter files, and the contract between such a file and a graph that takes it.

A graph made for adapters has, at every place where one may stand, A (in, rank) and B (rank, out) as
optional inputs. An `.onnx_adapter` is a FlatBuffer of tensors under those inputs' names
(onnxruntime/lora/adapter_format/adapter_schema.fbs) and two whole numbers that onnxruntime never looks
at. They are used here: `model_version` is the base's fingerprint, `adapter_version` the adapter's.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export import files
from lora_export.errors import EnvironmentLacking, InputRefused, OutputFailed, one_line
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Layout, Plan, TensorSpec

KEY = "lora_export.inputs"  # of the contract, in a graph's metadata
ROWS = "lora_export.rows"  # of the adapters' names, in a graph's metadata where each row of a batch chooses its own
IDS = "adapter_ids"  # such a graph's input
SUFFIX = ".onnx_adapter"
LIMIT = (1 << 31) - (1 << 20)  # bytes; a FlatBuffer ends at 2 GiB, names and padding included
SHOWN = 20  # misfits that an error lists
# ONNX's numbers of the types that a weight may have
ONNX_TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Place:
    """One place in a graph where an adapter may stand."""

    weight: str  # the base's name for the weight beside which it stands
    a: str  # the graph's input (in, rank)
    b: str  # the graph's input (rank, out); the scale lies in it
    shape: tuple[int, int]  # (out, in) of the weight
    dtype: str
    digest: str  # of the weight's contents

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.weight, self.shape, self.dtype, Layout.OUT_IN)


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
        return {name: place for place in self.places for name in (place.a, place.b)}

    def __str__(self) -> str:
        """As it stands in a graph's metadata."""
        places = [
            {"weight": p.weight, "a": p.a, "b": p.b, "shape": list(p.shape), "dtype": p.dtype, "digest": p.digest}
            for p in self.places
        ]
        return json.dumps({"base": self.base, "names": self.names, "places": places})


def read_contract(metadata: Mapping[str, str], source: Path | str) -> Contract:
    """The contract in a graph's metadata. Raises InputRefused where there is none, or it is damaged."""
    if KEY not in metadata:
        raise InputRefused(
            f"{source} does not say where it takes adapters: it was not made by `lora-export onnx --lora inputs`, or "
            f"has lost its metadata ({KEY})"
        )
    record = files.parse_json(metadata[KEY].encode(), f"{source}, {KEY}")
    try:
        places = tuple(_place(entry) for entry in record["places"])
        contract = Contract(str(record["base"]), str(record["names"]), places)
        _31_bits(contract.base)
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{source}: its record of the places for adapters ({KEY}) is damaged: {error!r}") from error
    return contract


def _place(entry: Mapping[str, Any]) -> Place:
    out_features, in_features = entry["shape"]
    texts = {key: str(entry[key]) for key in ("weight", "a", "b", "dtype", "digest")}
    return Place(shape=(int(out_features), int(in_features)), **texts)


def _31_bits(fingerprint: str) -> int:
    return int(fingerprint[:8], 16) & 0x7FFFFFFF


# --- an adapter as such a file holds it ---------------------------------------------------------


def refuse_what_no_input_carries(adapters: Sequence[Adapter]) -> None:
    """Raise InputRefused for adapters that hold more than low-rank pairs of matrices, naming what."""
    told = []
    for adapter in adapters:
        bad = [f"{name}: a whole tensor" for name in adapter.replaced]
        bad += [f"{name}: a change of a bias" for name in adapter.biases]
        bad += [f"{name}: rows of tokens" for name in adapter.rows]
        bad += [f"{name}: {what}" for name, pair in adapter.pairs.items() if (what := _unfit(pair))]
        told += [one_line(f"  {adapter.name}, {line}") for line in bad]
    if told:
        more = [f"  and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
        raise InputRefused(
            "A and B of linear layers can be swapped while a graph runs; these cannot:\n"
            + "\n".join([*told[:SHOWN], *more])
            + "\nMerge such an adapter into a graph of its own (--lora merged). Nothing was written."
        )


def _unfit(pair: LoraPair) -> str:
    if pair.magnitude is not None:
        return "DoRA, whose factor such a graph has no input for"
    if pair.embedding:
        return "an embedding, which reads no x"
    return "" if pair.a.ndim == pair.b.ndim == 2 else "a convolution"


def parameters(contract: Contract, plan: Plan, adapter: str) -> dict[str, NDArray[Any]]:
    """What one adapter of a plan gives to the graph's inputs: A (in, rank), and B (rank, out) times its scale.

    Two pairs of one adapter that land on one weight stand side by side in the rank. Raises InputRefused
    where the graph's dtype cannot hold a value.
    """
    by_weight = {place.weight: place for place in contract.places}
    given: dict[str, NDArray[Any]] = {}
    for step in plan.low_rank:
        terms = [term for term in step.terms if term.adapter == adapter]
        if not terms:
            continue
        place = by_weight[step.weight]
        with np.errstate(over="ignore"):  # looked for where it is stored
            scaled = [term.pair.b.T * np.float32(term.strength * term.pair.scale) for term in terms]
        a = np.concatenate([term.pair.a.T for term in terms], axis=1)
        b = np.concatenate(scaled)
        for name, array in ((place.a, a), (place.b, b)):
            given[name] = stored(f"{adapter}, {step.weight}", name, array, place.dtype)
    return given


def stored(what: str, name: str, array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
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
    files.must_be_regular(path)
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
        a, b = adapter.values.get(place.a), adapter.values.get(place.b)
        if (a is None) != (b is None):
            yield f"{place.a if a is None else place.b}: missing, though {place.b if a is None else place.a} is there"
        for name, value in ((place.a, a), (place.b, b)):
            if value is not None and value.element_type() != ONNX_TYPES[place.dtype]:
                yield f"{name}: {value.data_type()}, the graph takes {place.dtype}"
        if a is not None and b is not None:
            yield from _shape_misfits(place, list(a.shape()), list(b.shape()))


def _shape_misfits(place: Place, a: list[int], b: list[int]) -> Iterator[str]:
    out_features, in_features = place.shape
    if len(a) != 2 or a[0] != in_features:
        yield f"{place.a}: {a}, the graph takes [{in_features}, rank]"
    elif len(b) != 2 or b[1] != out_features:
        yield f"{place.b}: {b}, the graph takes [rank, {out_features}]"
    elif a[1] != b[0]:
        yield f"{place.a} {a} and {place.b} {b}: the ranks disagree"


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
