"""Messages between a process and its child: a JSON header and arrays, in plain bytes. Nothing is pickled."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.isolation.limits import MAX_ANSWER

MESSAGE_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
    )
}


def write_message(stream: io.BufferedIOBase, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a header and arrays, of the dtypes above. Raises TypeError for another dtype."""
    for name, array in arrays.items():
        if array.dtype.name not in MESSAGE_DTYPES:
            raise TypeError(f"{name} is {array.dtype}")
    described = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    content = json.dumps({**header, "arrays": described}).encode()
    stream.write(len(content).to_bytes(8, "little") + content)
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stream.flush()


def read_message(stream: io.BufferedIOBase, *, most: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a header and arrays. The sender is not trusted.

    Raises EOFError where the sender has ended, and ValueError for another message, or one with more than `most` bytes
    of arrays.
    """
    size = int.from_bytes(_exactly(stream, 8), "little")
    if size > MAX_ANSWER:
        raise ValueError(f"a header of {size:,} bytes")
    header = json.loads(_exactly(stream, size))
    described = header.pop("arrays")
    sizes = [math.prod(shape) * MESSAGE_DTYPES[dtype].itemsize for _, dtype, shape in described]
    if sum(sizes) > most or any(length < 0 for _, _, shape in described for length in shape):
        raise ValueError(f"arrays of {sum(sizes):,} bytes")
    arrays = {}
    for (name, dtype, shape), nbytes in zip(described, sizes, strict=True):
        arrays[str(name)] = np.frombuffer(_exactly(stream, nbytes), MESSAGE_DTYPES[dtype]).reshape(shape)
    return header, arrays


def _exactly(stream: io.BufferedIOBase, size: int) -> bytearray:
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        count = stream.readinto(view[done:])
        if not count:
            raise EOFError("the other process has ended")
        done += count
    return content
