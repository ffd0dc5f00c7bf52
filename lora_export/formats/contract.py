"""The record of a graph's adapter inputs, in its metadata: which weight each of them is for, and its shape."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.options.spelling import command
from lora_export.plan import Layout, TensorSpec
from lora_export.storage import json_files

CONTRACT_KEY = "lora_export.inputs"

AdapterArrays = Mapping[str, NDArray[Any]]  # input -> its value
NO_ARRAYS: AdapterArrays = MappingProxyType({})


@dataclass(frozen=True)
class AdapterPlace:
    """The optional inputs of a graph that take an adapter for one weight.

    A linear layer takes A (in, rank) and B (rank, out). An embedding takes the same; `in` is its number of rows.
    A convolution takes A (rank, in, kernel) and B (out, rank, 1...). B contains the scale.
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

    @property
    def spec(self) -> TensorSpec:
        shape = self.shape[::-1] if self.embedding else self.shape
        return TensorSpec(self.weight, shape, self.dtype, Layout.EMBEDDING if self.embedding else Layout.OUT_IN)

    @property
    def input_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shape of each input, by its name. The size of the rank is None, unless it is fixed."""
        out, inner, *kernel = self.shape
        ones, rank = (1,) * len(kernel), self.max_rank or None
        a = (rank, inner, *kernel) if kernel else (inner, rank)
        b = (out, rank, *ones) if kernel else (rank, out)
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
        is_a, is_linear = name == self.a, len(self.shape) == 2
        return int(is_a == is_linear)

    def padded(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Return A or B with zeros up to the fixed rank; unchanged where any rank fits."""
        sizes, axis = [(0, 0)] * array.ndim, self.rank_axis(name)
        sizes[axis] = (0, max(0, self.max_rank - array.shape[axis]))
        return np.pad(array, sizes) if self.max_rank else array


@dataclass(frozen=True)
class Contract:
    """The adapter inputs of a graph, and the base that the graph holds."""

    base: str  # fingerprint of all the base's weights, as hex
    names: str  # a hash of their names alone
    places: tuple[AdapterPlace, ...]
    required: bool = False  # whether the inputs have no default, so that every run has to feed them

    @property
    def version(self) -> int:
        """What an adapter's file holds of the fingerprint."""
        return version_of(self.base)

    @property
    def inputs(self) -> dict[str, AdapterPlace]:
        """The place of each input, by the input's name."""
        return {name: place for place in self.places for name in place.input_shapes}

    def without_adapter(self) -> dict[str, NDArray[Any]]:
        """Return the values of all inputs when there is no adapter."""
        return {name: value for place in self.places for name, value in place.without_adapter().items()}

    def __str__(self) -> str:
        """The JSON that a graph's metadata holds."""
        defaults = {one.name: one.default for one in fields(AdapterPlace)}
        records = [
            {key: value for key, value in asdict(place).items() if value != defaults[key]} for place in self.places
        ]
        required = {"required": True} if self.required else {}
        return json.dumps({"base": self.base, "names": self.names, **required, "places": records})


def read_contract(metadata: Mapping[str, str], source: Path | str) -> Contract:
    """Read the contract in a graph's metadata. Raises InputRefused where there is none, or where it is damaged."""
    if CONTRACT_KEY not in metadata:
        raise InputRefused(
            f"{source} does not record where it takes adapters: it was not made by `{command('onnx', lora='inputs')}`, "
            f"or it has lost its metadata ({CONTRACT_KEY})"
        )
    record = json_files.parse_json(metadata[CONTRACT_KEY].encode(), f"{source}, {CONTRACT_KEY}")
    try:
        places = tuple(_place(entry) for entry in record["places"])
        contract = Contract(str(record["base"]), str(record["names"]), places, bool(record.get("required")))
        version_of(contract.base)
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{source}: its record of adapter inputs ({CONTRACT_KEY}) is damaged: {error!r}") from error
    return contract


def _place(entry: Mapping[str, Any]) -> AdapterPlace:
    shape = tuple(map(operator.index, entry["shape"]))
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"a weight of shape {shape}")
    texts = {key: str(entry[key]) for key in ("weight", "a", "b", "dtype", "digest")}
    texts |= {key: str(entry[key]) for key in ("factor", "scale", "value", "quantised") if key in entry}
    start, stop = map(operator.index, entry.get("block", (0, 0)))
    max_rank = operator.index(entry.get("max_rank", 0))
    if max_rank < 0:
        raise ValueError(f"a rank of {max_rank}")
    block = (start, stop) if "block" in entry else None
    return AdapterPlace(shape=shape, embedding=bool(entry.get("embedding")), block=block, max_rank=max_rank, **texts)


def version_of(fingerprint: str) -> int:
    """The first 31 bits of a hash: an adapter's file holds no more."""
    return int(fingerprint[:8], 16) & 0x7FFFFFFF
