"""Servers of tensors (KServe v2): what is sent and read, and what is no answer of the protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.runtime.endpoint import tensors
from lora_export.runtime.endpoint.tensors import is_of_tensors, open_tensors_of
from support.endpoints import reply, running

METADATA = {
    "name": "m",
    "platform": "onnxruntime_onnx",
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "ids", "datatype": "INT32", "shape": [-1]},
    ],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
}
INPUTS = {"x": np.array([[0.1, 1], [2, 3]], np.float32), "ids": np.array([7, 8])}
RIGHT = {"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [0.30000001192092896, 2, -1e-7, 4]}


def binary(output: dict[str, Any], content: bytes, size: Any = None) -> dict[str, Any]:
    """An output whose bytes follow the JSON."""
    described = {name: value for name, value in output.items() if name != "data"}
    return {**described, "parameters": {"binary_data_size": len(content) if size is None else size}, "own": content}


@contextmanager
def server(
    output: Any = None,
    metadata: Any = None,
    sent: list[Any] | None = None,
    *,
    is_binary: bool = False,
    length: str = "",
    description: tuple[Any, int] | None = None,
) -> Iterator[str]:
    def handle(request: Any) -> None:
        if request.path == "/v2/models/m":
            reply(request, METADATA if metadata is None else metadata)
        elif request.path == "/v2" and is_binary:
            reply(request, {"name": "triton", "extensions": ["sequence", "binary_tensor_data"]})
        elif request.path == "/v2" and description is not None:
            reply(request, *description)
        elif request.path == "/v2/models/m/infer":
            end = int(request.headers.get("Inference-Header-Content-Length", len(request.body)))
            if sent is not None:
                sent.append(json.loads(request.body[:end]) | ({"bytes": request.body[end:]} if is_binary else {}))
            found = dict(RIGHT if output is None else output) if not isinstance(output, str) else output
            content = found.pop("own", b"") if isinstance(found, dict) else b""
            described = json.dumps({"model_name": "m", "outputs": [found]}).encode()
            header = {"Inference_Header_Content_Length": length or str(len(described))} if is_binary else {}
            reply(request, described + content, **header)
        else:
            reply(request, {"error": "unknown model"}, 404)

    with running(handle) as address:
        yield f"{address.removesuffix('/v1')}/v2"


@pytest.mark.parametrize("data", [RIGHT["data"], [[0.30000001192092896, 2], [-1e-7, 4]]], ids=["flat", "nested"])
def test_arrays_are_sent_and_read_as_they_are(data: list[Any]) -> None:
    sent: list[Any] = []
    with server({**RIGHT, "data": data}, sent=sent) as address:
        runner = open_tensors_of(f"{address}/models/m", None, 10)
        outputs = runner.run(INPUTS)
    assert runner.axes == {"x": (None, 2), "ids": (None,)}
    assert outputs["y"].dtype == np.float32
    assert outputs["y"].tolist() == np.array([[0.3, 2], [-1e-7, 4]], np.float32).tolist()
    (body,) = sent
    by_name = {one["name"]: one for one in body["inputs"]}
    assert by_name["ids"] == {"name": "ids", "datatype": "INT32", "shape": [2], "data": [7, 8]}
    assert np.array(by_name["x"]["data"], np.float32).tolist() == INPUTS["x"].ravel().tolist()
    assert runner.facts == {"model": "m", "platform": "onnxruntime_onnx", "server": runner.client.server, "requests": 3}


def test_bytes_are_sent_and_read_where_the_server_takes_them() -> None:
    """As Triton does: the lowest byte first, in the sequence of the list."""
    sent: list[Any] = []
    halves = {**METADATA, "inputs": [{"name": "x", "datatype": "BF16", "shape": [-1, 2]}, METADATA["inputs"][1]]}
    y = np.array([[0.1, 2], [-1e-7, 4]], "<f4")
    own = {"x": np.array([[0.5, 1], [2, 3]], np.float32), "ids": np.array([7, 8])}
    with server(binary(RIGHT, y.tobytes()), halves, sent, is_binary=True) as address:
        runner = open_tensors_of(f"{address}/models/m", None, 10)
        assert runner.run(own)["y"].tolist() == y.tolist()
    assert "tensors as bytes" in runner.notes[0]
    (body,) = sent
    assert body["bytes"] == bytes([0, 0x3F, 0x80, 0x3F, 0, 0x40, 0x40, 0x40, 7, 0, 0, 0, 8, 0, 0, 0])
    described = {"name": "ids", "datatype": "INT32", "shape": [2], "parameters": {"binary_data_size": 8}}
    assert body["inputs"][1] == described
    assert body["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]
    with server(RIGHT, is_binary=True) as address:  # it may answer in JSON nonetheless
        assert open_tensors_of(f"{address}/models/m", None, 10).run(INPUTS)["y"][1, 1] == 4


def test_inputs_are_rounded_to_what_the_server_holds() -> None:
    halves = {**METADATA, "inputs": [{"name": "x", "datatype": "FP16", "shape": [-1]}, METADATA["inputs"][1]]}
    with server(metadata=halves, is_binary=True) as address:
        runner = open_tensors_of(f"{address}/models/m", None, 10)
        found = runner.rounded({"x": np.array([0.1, 1e6, -2], np.float32), "ids": np.array([1 << 40])})
        assert found["x"].dtype == np.float32 and found["ids"].tolist() == [1 << 40]
        assert found["x"].tolist() == [float(np.float16(0.1)), 1e6, -2]
        with pytest.raises(RuntimeRefused, match="takes x as FP16, which does not hold its values"):
            runner.run({"x": found["x"], "ids": np.array([1])})


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"<html>a console</html>", 200), ([], 200), ({"extensions": 5}, 200), ("no", 307), ("no", 403), ("no", 503)],
)
def test_numbers_travel_as_json_where_the_server_does_not_describe_itself(
    content: Any, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "MOST_SECONDS_OF_SERVER", 0.7)
    with server(description=(content, code)) as address:
        runner = open_tensors_of(f"{address}/models/m", None, 10)
        assert not runner.is_binary and runner.run(INPUTS)["y"][1, 1] == 4
    assert runner.client.seconds == 10 and runner.facts["requests"] == (4 if code == 503 else 3)


@pytest.mark.parametrize(
    ("output", "length", "message"),
    [
        (binary(RIGHT, b"x" * 15), "", "y has numbers or a shape that FP32 cannot hold"),
        (binary(RIGHT, b"x" * 12), "", r"y has 3 numbers for the shape \[2, 2\]"),
        (binary(RIGHT, b"x" * 16, 17), "", "binary_data_size is 17, and 16 bytes are left"),
        (binary(RIGHT, b"x" * 16, -1), "", "binary_data_size is -1"),
        (binary(RIGHT, b"x" * 16, True), "", "binary_data_size is True"),
        (binary({**RIGHT, "datatype": "FP64"}, b"x" * 16), "", "y has no FP32"),
        (binary({**RIGHT, "shape": [10**30, 0]}, b""), "", "y has numbers or a shape that FP32 cannot hold"),
        (RIGHT, "-1", "a header Inference-Header-Content-Length that is no number"),
        (RIGHT, "5", "what is no JSON"),
    ],
)
def test_other_bytes_are_refused(output: Any, length: str, message: str) -> None:
    with server(output, is_binary=True, length=length) as address, pytest.raises(RuntimeRefused, match=message):
        open_tensors_of(f"{address}/models/m", None, 10).run(INPUTS)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({**RIGHT, "name": "z"}, "it lacks the output y"),
        ({**RIGHT, "datatype": "FP64"}, "y has no FP32"),
        ({**RIGHT, "shape": [-2, 2]}, "y has no FP32"),
        ({**RIGHT, "data": [1, 2, 3]}, r"y has 3 numbers for the shape \[2, 2\]"),
        ({**RIGHT, "data": [1, 2, 3, "4"]}, "y has numbers that are no FP32"),
        ({**RIGHT, "shape": [0, 10**30], "data": []}, "y has numbers or a shape that FP32 cannot hold"),
        ({**RIGHT, "data": [True, 2, 3, 4]}, "y has numbers that are no FP32"),
        ("y", "it lacks the output y"),
    ],
)
def test_another_answer_is_refused(output: Any, message: str) -> None:
    with server(output) as address, pytest.raises(RuntimeRefused, match=message):
        open_tensors_of(f"{address}/models/m", None, 10).run(INPUTS)


@pytest.mark.parametrize(
    ("metadata", "path", "message"),
    [
        ({"inputs": []}, "/models/m", "have no `inputs` with names, types and shapes"),
        ({**METADATA, "outputs": [{"name": "y"}]}, "/models/m", "have no `outputs`"),
        (None, "/models/other", "answered 404: unknown model. Is other the name of a model there"),
        (None, "/models/two words", "answered 404: unknown model. Is two words the name of a model there"),
        (None, "", r"names no model: give .*/v2/models/NAME, or its name by served_name="),
    ],
)
def test_what_is_no_model_is_refused(metadata: Any, path: str, message: str) -> None:
    with server(metadata=metadata) as address, pytest.raises(InputRefused, match=message):
        open_tensors_of(f"{address}{path}", None, 10)


def test_types_without_numbers_are_refused() -> None:
    inputs = [{"name": "x", "datatype": "FP16", "shape": [-1, 2]}, METADATA["inputs"][1]]
    halves = server(metadata={**METADATA, "inputs": inputs})
    with halves as address, pytest.raises(InputRefused, match="x is FP16 at the server"):
        open_tensors_of(address, "m", 10).run(INPUTS)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("INT32", np.array([7, 1 << 40])),
        ("UINT64", np.array([-1, 3])),
        ("INT64", np.array([1, (1 << 64) - 1], np.uint64)),
        ("UINT64", np.array([-1, 3], np.int8)),
        ("BOOL", np.array([2, 1])),
    ],
)
def test_integers_that_do_not_fit_are_refused(datatype: str, values: Any) -> None:
    ids = {"name": "ids", "datatype": datatype, "shape": [-1]}
    with server(metadata={**METADATA, "inputs": [METADATA["inputs"][0], ids]}) as address:
        runner = open_tensors_of(address, "m", 10)
        with pytest.raises(RuntimeRefused, match=f"takes ids as {datatype}, which does not hold its"):
            runner.run({**INPUTS, "ids": values})


def test_addresses_of_the_second_version_are_of_tensors() -> None:
    assert is_of_tensors("https://host/v2") and is_of_tensors("http://host:8000/kserve/v2/models/m")
    assert not is_of_tensors("https://host/v1") and not is_of_tensors("https://v2.host/v1")
