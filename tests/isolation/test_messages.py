"""Messages of arrays between two processes."""

from __future__ import annotations

import io
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_export.isolation.process import MESSAGE_DTYPES, read_message, write_message


def sent(header: dict[str, Any], arrays: dict[str, Any]) -> io.BytesIO:
    stream = io.BytesIO()
    write_message(stream, header, arrays)
    stream.seek(0)
    return stream


def raw(header: dict[str, Any], content: bytes = b"") -> io.BytesIO:
    text = json.dumps(header).encode()
    return io.BytesIO(len(text).to_bytes(8, "little") + text + content)


@pytest.mark.parametrize("dtype", MESSAGE_DTYPES.values(), ids=str)
def test_arrays_arrive_with_their_bits(dtype: np.dtype[Any]) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    arrays = {"a": array, "turned": array.T, "scalar": np.asarray(array[0, 1]), "empty": array[:0]}
    arrays["swapped"] = array.astype(dtype.newbyteorder("S"))
    header, read = read_message(sent({"do": "run"}, arrays), most=1 << 20)
    assert header == {"do": "run"} and read.keys() == arrays.keys()
    assert all(np.array_equal(read[k], v) and read[k].dtype == dtype for k, v in arrays.items())


def test_array_of_objects_is_not_sent() -> None:
    with pytest.raises(TypeError, match="object"):
        sent({}, {"a": np.array([{}])})


@pytest.mark.parametrize(
    "stream",
    [
        raw({"arrays": [["a", "float32", [1 << 40]]]}),
        raw({"arrays": [["a", "float32", [-1, -4]]]}, bytes(16)),
        raw({"arrays": [["a", "object", [1]]]}),
        raw({}),
        raw({"arrays": [3]}),
        io.BytesIO((1 << 40).to_bytes(8, "little")),
        io.BytesIO((2).to_bytes(8, "little") + b"[["),
        io.BytesIO((200_000).to_bytes(8, "little") + b"[" * 200_000),
    ],
)
def test_malformed_message_is_refused_before_memory_is_taken(stream: io.BytesIO) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_message(stream, most=1 << 20)


def test_message_that_ends_early_is_the_end() -> None:
    whole = sent({}, {"a": np.arange(8).astype(ml_dtypes.bfloat16)}).getvalue()
    for size in (0, 4, 12, len(whole) - 1):
        with pytest.raises(EOFError):
            read_message(io.BytesIO(whole[:size]), most=1 << 20)
