"""Inputs made by hand: safetensors files as bytes, and PEFT adapters without PEFT."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_export import sums
from lora_export.formats.peft_records import LAYOUTS


def rounded_sum(weight: NDArray[Any], change: NDArray[np.float32], dtype: Any = None) -> NDArray[Any]:
    """What a merge stores for a weight and its change; `dtype` is the weight's own unless given."""
    total = np.empty(weight.shape, sums.sum_dtype(weight.dtype))
    sums.add_into(total, weight, change)
    rounded = np.empty(weight.shape, weight.dtype if dtype is None else dtype)
    sums.round_into(rounded, total)
    return rounded


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.proof), "w")


def raw_tensor_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with this header, however wrong; `length` is what it claims the header's length to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def base_file(
    path: Path, tensors: Mapping[str, Any], dtype: Any = np.float32, metadata: dict[str, str] | None = None
) -> Path:
    """A checkpoint of these matrices."""
    save_file({name: np.ascontiguousarray(value, dtype) for name, value in tensors.items()}, path, metadata)
    return path


def peft_adapter(
    folder: Path,
    pairs: Mapping[str, tuple[Any, Any]],
    whole: Mapping[str, Any] | None = None,
    *,
    layout: str = "out_in",
    **config: Any,
) -> Path:
    """A PEFT adapter of these (A, B) and whole tensors; its rank is that of the first A, its scale 1 by default.

    It records the layout of the weights, as `lora-export train` does; with an empty one nothing, as PEFT.
    """
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    for name, value in (whole or {}).items():
        tensors[f"base_model.model.{name}"] = np.asarray(value)
    rank = next((len(a) for a, _ in pairs.values()), 1)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(pairs)}
    if whole:
        fields["modules_to_save"] = sorted({name.rpartition(".")[0] for name in whole})
    folder.mkdir(parents=True, exist_ok=True)
    # One entry only: save_file writes several in any order, and equal adapters have equal bytes.
    metadata = {LAYOUTS: json.dumps(dict.fromkeys(pairs, layout))} if layout else {"format": "pt"}
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def add_tensors(adapter: Path, tensors: Mapping[str, Any]) -> Path:
    """Add tensors to the file of an adapter, or replace them. The metadata of its header stays."""
    path = adapter / "adapter_model.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(load_file(path) | dict(tensors), path, metadata)
    return adapter


def graph_file(path: Path, weights: Mapping[str, Any], *, data: str | Mapping[str, str] = "", **metadata: str) -> Path:
    """A graph with a MatMul for each of these (in, out) matrices, by x, under the name of its module.

    `data` is the file beside it that holds the matrices, one for all or one for each; by default they are inside.
    """
    values = {name: np.asarray(value) for name, value in weights.items()}
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{n}"], name=f"node_{n}") for n, name in enumerate(values)]
    (kind,) = {helper.np_dtype_to_tensor_dtype(value.dtype) for value in values.values()}
    (inner,) = {value.shape[0] for value in values.values()}
    x = helper.make_tensor_value_info("x", kind, ["batch", inner])
    ys = [helper.make_tensor_value_info(f"y{n}", kind, ["batch", v.shape[1]]) for n, v in enumerate(values.values())]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], ys, tensors), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    helper.set_model_props(model, metadata)
    for tensor in model.graph.initializer if data else ():
        place = path.parent / (data if isinstance(data, str) else data[tensor.name])
        with place.open("ab") as file:
            start = file.tell() + -file.tell() % 64
            file.write(bytes(start - file.tell()) + tensor.raw_data)
        where = {"location": place.name, "offset": start, "length": len(tensor.raw_data)}
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path
