"""Servers of tensors: the Open Inference Protocol (KServe v2) of Triton, OpenVINO Model Server, MLServer and KServe.

Inputs and outputs are those of the server's own metadata, as JSON over HTTP. Types that JSON has no numbers for, such
as FP16, are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.options.spelling import named
from lora_export.runtime.endpoint.client import Client, RequestRefused, key_of
from lora_export.runtime.runner import Arrays, PlainRunner, completed_inputs

DATATYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    **{f"{kind.upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    "FP32": np.float32,
    "FP64": np.float64,
}
VERSION, MODELS = "v2", "models"  # parts of an address


@dataclass(frozen=True)
class ServedTensor:
    """An input or output, as the server's metadata describe it."""

    name: str
    datatype: str
    sizes: tuple[int | None, ...]  # None where they vary

    @property
    def dtype(self) -> np.dtype[Any]:
        """Raises InputRefused for a type that JSON has no numbers for."""
        if self.datatype not in DATATYPES:
            raise InputRefused(f"{self.name} is {self.datatype} at the server, and JSON has no numbers of this type")
        dtype: np.dtype[Any] = np.dtype(DATATYPES[self.datatype])
        return dtype


class TensorRunner(PlainRunner):
    """A model of such a server. One request a run, bounded as those of `Client` are."""

    def __init__(self, client: Client, model: str, metadata: Mapping[str, Any]):
        self.client, self.model = client, model
        self._inputs = {one.name: one for one in _described(metadata, "inputs", client)}
        self._outputs = {one.name: one for one in _described(metadata, "outputs", client)}
        self.axes: Mapping[str, tuple[int | None, ...]] = {name: one.sizes for name, one in self._inputs.items()}
        self.names_known = len(self._outputs) > 1
        self.platform = str(metadata.get("platform", ""))

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        """Where it ran, and how it was requested."""
        return [f"{self.client.address}: {self.model} ({self.platform or 'no platform stated'}), tensors as JSON"]

    @property
    def facts(self) -> dict[str, Any]:
        """What a report has of the server."""
        facts = {"model": self.model, "platform": self.platform, "server": self.client.server}
        return {**facts, "requests": self.client.requests}

    def run(self, inputs: Arrays) -> Arrays:
        """Raises RuntimeRefused where the server refuses, or answers with other tensors than its metadata have."""
        sent = [self._sent(self._inputs[name], value) for name, value in completed_inputs(inputs, self.axes).items()]
        wanted = [{"name": name} for name in self._outputs]
        answer = self.client.post(f"{MODELS}/{self.model}/infer", {"inputs": sent, "outputs": wanted})
        listed = answer.get("outputs")
        tensors = {one.get("name"): one for one in listed if isinstance(one, dict)} if isinstance(listed, list) else {}
        return {name: self._array(one, tensors.get(name)) for name, one in self._outputs.items()}

    def _sent(self, tensor: ServedTensor, value: NDArray[Any]) -> dict[str, Any]:
        array = value.astype(tensor.dtype)
        if not np.array_equal(array, value):
            raise RuntimeRefused(f"the server takes {tensor.name} as {tensor.datatype}, which does not hold its values")
        described = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(array.shape)}
        return {**described, "data": array.ravel().tolist()}

    def _array(self, tensor: ServedTensor, found: Mapping[str, Any] | None) -> NDArray[Any]:
        """An output. Its numbers may be nested, as the protocol allows, or in a row."""
        if found is None:
            raise self._wrong(f"it lacks the output {tensor.name}")
        shape, data = found.get("shape"), found.get("data")
        if found.get("datatype") != tensor.datatype or not _is_shape(shape) or not isinstance(data, list):
            raise self._wrong(f"{tensor.name} has no {tensor.datatype}, `shape` and `data`")
        numbers = list(_flat(data))
        if len(numbers) != math.prod(shape) or not all(isinstance(each, bool | int | Decimal) for each in numbers):
            raise self._wrong(f"{tensor.name} has {len(numbers)} numbers for the shape {shape}")
        kinds = (bool,) if tensor.dtype == np.bool_ else (int,) if tensor.dtype.kind in "iu" else (int, Decimal)
        if not all(type(each) in kinds for each in numbers):
            raise self._wrong(f"{tensor.name} has numbers that are no {tensor.datatype}")
        try:
            return np.array(numbers, tensor.dtype).reshape(shape)
        except (OverflowError, ValueError):
            raise self._wrong(f"{tensor.name} has numbers or a shape that {tensor.datatype} cannot hold") from None

    def _wrong(self, what: str) -> RuntimeRefused:
        return RuntimeRefused(f"{self.client.address} answered with JSON that is no inference: {what}")


def is_of_tensors(address: str) -> bool:
    """Whether an address is that of the protocol's second version: https://host/v2, or a model there."""
    return VERSION in urlsplit(address).path.split("/")


def open_tensors_of(address: str, served_name: str | None, seconds: float) -> TensorRunner:
    """A runner of https://host/v2/models/NAME, or of `served_name` at https://host/v2.

    Raises InputRefused where no model is named, or its metadata are not those of the protocol, and as `Client.post`.
    """
    root, _, rest = address.rstrip("/").partition(f"/{VERSION}/{MODELS}/")
    model = served_name or rest
    if not model:
        way = f"{address.rstrip('/')}/{MODELS}/NAME"
        raise InputRefused(f"{address} names no model: give {way}, or its name by {named('served_name')}")
    client = Client(f"{root.removesuffix(f'/{VERSION}')}/{VERSION}", seconds, key_of(address))
    try:
        metadata = client.get(f"{MODELS}/{model}")
    except RequestRefused as refusal:
        raise InputRefused(f"{refusal}. Is {model} the name of a model there?") from None
    return TensorRunner(client, model, metadata)


def _described(metadata: Mapping[str, Any], key: str, client: Client) -> list[ServedTensor]:
    entries = metadata.get(key)
    found = [
        ServedTensor(entry["name"], str(entry.get("datatype")), tuple(None if n < 0 else n for n in entry["shape"]))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and _is_shape(entry.get("shape"), least=-1)
    ]
    if not found or len(found) != len(entries or []):
        raise InputRefused(f"{client.address}: the metadata of the model have no `{key}` with names, types and shapes")
    return found


def _is_shape(value: Any, least: int = 0) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= least for size in value)


def _flat(data: list[Any]) -> Any:
    for each in data:
        if isinstance(each, list):
            yield from _flat(each)
        else:
            yield each
