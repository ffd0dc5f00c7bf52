"""Servers of tensors: the Open Inference Protocol (KServe v2) of Triton, OpenVINO Model Server, MLServer and KServe.

Inputs and outputs are those of the server's own metadata, over HTTP: as bytes where the server states that it has the
binary extension, as Triton does, else as JSON. Types that JSON has no numbers for, such as FP16, are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.options.spelling import named
from lora_export.runtime.endpoint.client import Client, RequestRefused, key_of
from lora_export.runtime.runner import Arrays, PlainRunner, completed_inputs

DATATYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    **{f"{kind.upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    "FP32": np.float32,
    "FP64": np.float64,
}
HALF_DATATYPES: Mapping[str, Any] = {"FP16": np.float16, "BF16": ml_dtypes.bfloat16}
BINARY_DATATYPES: Mapping[str, Any] = {**DATATYPES, **HALF_DATATYPES}
BINARY = "binary_tensor_data"  # the extension's name in the server's metadata
SIZE = "binary_data_size"  # the parameter of a tensor whose bytes follow
VERSION, MODELS = "v2", "models"  # parts of an address
MOST_SECONDS_OF_SERVER = 5.0  # that its description may take, which it may lack


@dataclass(frozen=True)
class ServedTensor:
    """An input or output, as the server's metadata describe it."""

    name: str
    datatype: str
    sizes: tuple[int | None, ...]  # None where they vary

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(BINARY_DATATYPES[self.datatype])
        return dtype


class TensorRunner(PlainRunner):
    """A model of such a server. One request a run, bounded as those of `Client` are.

    Raises InputRefused for metadata that are not those of the protocol, and tensors of a type that is not sent.
    """

    def __init__(self, client: Client, model: str, metadata: Mapping[str, Any], *, is_binary: bool = False):
        self.client, self.model, self.is_binary = client, model, is_binary
        self._inputs = {one.name: one for one in _described(metadata, "inputs", client)}
        self._outputs = {one.name: one for one in _described(metadata, "outputs", client)}
        for one in (*self._inputs.values(), *self._outputs.values()):
            if one.datatype not in (BINARY_DATATYPES if is_binary else DATATYPES):
                why = "which has no numbers" if is_binary else "and JSON has no numbers of this type"
                raise InputRefused(f"{one.name} is {one.datatype} at the server, {why}")
        self.axes: Mapping[str, tuple[int | None, ...]] = {name: one.sizes for name, one in self._inputs.items()}
        self.names_known = len(self._outputs) > 1
        self.platform = str(metadata.get("platform", ""))

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        """Where it ran, and how it was requested."""
        platform, form = self.platform or "no platform stated", "bytes" if self.is_binary else "JSON"
        return [f"{self.client.address}: {self.model} ({platform}), tensors as {form}"]

    @property
    def facts(self) -> dict[str, Any]:
        """What a report has of the server."""
        facts = {"model": self.model, "platform": self.platform, "server": self.client.server}
        return {**facts, "requests": self.client.requests}

    def rounded(self, inputs: Arrays) -> Arrays:
        """The inputs with the numbers that the server's FP16 or BF16 holds, in their own dtype."""
        halves = {name for name, one in self._inputs.items() if one.datatype in HALF_DATATYPES}
        return {
            name: _rounded(value, self._inputs[name].dtype) if name in halves else value
            for name, value in inputs.items()
        }

    def run(self, inputs: Arrays) -> Arrays:
        """Raises RuntimeRefused where the server refuses, or answers with other tensors than its metadata have."""
        completed = completed_inputs(inputs, self.axes)
        arrays = {name: _typed(self._inputs[name], value) for name, value in completed.items()}
        path, body = f"{MODELS}/{self.model}/infer", self._request(arrays)
        if not self.is_binary:
            return self._arrays(self.client.post(path, body), b"")
        return self._arrays(*self.client.post_tensors(path, body, b"".join(map(_little_bytes, arrays.values()))))

    def _request(self, arrays: Arrays) -> dict[str, Any]:
        """The description of inputs and wanted outputs; with the numbers, where these do not follow as bytes."""

        def sent(name: str, value: NDArray[Any]) -> dict[str, Any]:
            described = {"name": name, "datatype": self._inputs[name].datatype, "shape": list(value.shape)}
            content = {"parameters": {SIZE: value.nbytes}} if self.is_binary else {"data": value.ravel().tolist()}
            return {**described, **content}

        form = {"parameters": {"binary_data": True}} if self.is_binary else {}
        return {
            "inputs": [sent(name, value) for name, value in arrays.items()],
            "outputs": [{"name": name, **form} for name in self._outputs],
        }

    def _arrays(self, answer: Mapping[str, Any], content: bytes) -> Arrays:
        """The outputs of an answer. The bytes of tensors follow it, in the sequence of its list."""
        listed = answer.get("outputs")
        tensors: dict[Any, tuple[dict[str, Any], bytes | None]] = {}
        for one in listed if isinstance(listed, list) else []:
            if not isinstance(one, dict):
                continue
            parameters, own = one.get("parameters"), None
            if isinstance(parameters, dict) and (size := parameters.get(SIZE)) is not None:
                if type(size) is not int or not 0 <= size <= len(content):
                    raise self._wrong(f"{SIZE} is {size!r:.40}, and {len(content):,} bytes are left")
                own, content = content[:size], content[size:]
            tensors[str(one.get("name"))] = one, own
        return {name: self._array(one, *tensors.get(name, (None, None))) for name, one in self._outputs.items()}

    def _array(self, tensor: ServedTensor, found: Mapping[str, Any] | None, content: bytes | None) -> NDArray[Any]:
        """An output. Its numbers are `content`, or may be nested, as the protocol allows, or in a row."""
        if found is None:
            raise self._wrong(f"it lacks the output {tensor.name}")
        shape, data = found.get("shape"), found.get("data")
        has_numbers = content is not None or isinstance(data, list)
        if found.get("datatype") != tensor.datatype or not _is_shape(shape) or not has_numbers:
            raise self._wrong(f"{tensor.name} has no {tensor.datatype}, `shape` and `data`")
        try:
            array = self._of_json(tensor, data) if content is None else _of_little_bytes(content, tensor.dtype)
            if array.size != math.prod(shape):
                raise self._wrong(f"{tensor.name} has {array.size} numbers for the shape {shape}")
            return array.reshape(shape)
        except (OverflowError, ValueError):
            raise self._wrong(f"{tensor.name} has numbers or a shape that {tensor.datatype} cannot hold") from None

    def _of_json(self, tensor: ServedTensor, data: Any) -> NDArray[Any]:
        numbers = list(_flat(data))
        kinds = (bool,) if tensor.dtype == np.bool_ else (int,) if tensor.dtype.kind in "iu" else (int, Decimal)
        if tensor.datatype not in DATATYPES or not all(type(each) in kinds for each in numbers):
            raise self._wrong(f"{tensor.name} has numbers that are no {tensor.datatype}")
        return np.array(numbers, tensor.dtype)

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
    return TensorRunner(client, model, metadata, is_binary=_takes_bytes(client))


def _takes_bytes(client: Client) -> bool:
    """Whether a server states that it takes tensors as bytes. It need not describe itself: a gateway may lead to its
    models alone.
    """
    brief_client = replace(client, seconds=min(client.seconds, MOST_SECONDS_OF_SERVER))
    try:
        extensions = brief_client.get(f"../{VERSION}").get("extensions")
    except (RuntimeRefused, EnvironmentLacking):
        return False
    finally:
        client.requests = brief_client.requests
    return isinstance(extensions, list) and BINARY in extensions


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


def _typed(tensor: ServedTensor, value: NDArray[Any]) -> NDArray[Any]:
    array = value.astype(tensor.dtype)
    # The signs too: -1 as UINT64 is 2⁶⁴ - 1, which is -1 again as int64
    if not np.array_equal(array.astype(value.dtype), value) or not np.array_equal(array < 0, value < 0):
        raise RuntimeRefused(f"the server takes {tensor.name} as {tensor.datatype}, which does not hold its values")
    return array


def _rounded(value: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The nearest numbers of a type, in the array's own. What is too large for the type stays as it is."""
    if value.dtype.kind in "biu":
        return value
    with np.errstate(over="ignore"):
        rounded = value.astype(dtype).astype(value.dtype)
    return np.where(np.isfinite(rounded), rounded, value)


def _little_bytes(array: NDArray[Any]) -> bytes:
    """The numbers of an array, each with its lowest byte first."""
    words = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    return words.astype(words.dtype.newbyteorder("<")).tobytes()


def _of_little_bytes(content: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    words = np.frombuffer(content, f"<u{dtype.itemsize}")
    array: NDArray[Any] = words.astype(words.dtype.newbyteorder("="))
    return array != 0 if dtype == np.bool_ else array.view(dtype)


def _is_shape(value: Any, least: int = 0) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= least for size in value)


def _flat(data: list[Any]) -> Any:
    for each in data:
        if isinstance(each, list):
            yield from _flat(each)
        else:
            yield each
