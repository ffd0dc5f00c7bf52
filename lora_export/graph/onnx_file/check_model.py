"""ONNX's checker, extended by the operators that onnxruntime puts into ONNX's own domain."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx
from onnx import defs

from lora_export.errors import OutputFailed
from lora_export.graph.onnx_file.protobuf_wire import without_large_tensors

FLOAT_TYPES = ["tensor(bfloat16)", "tensor(double)", "tensor(float)", "tensor(float16)"]


def check_file(path: Path) -> None:
    """Check an ONNX file with `onnx.checker`. Accepts graphs that onnxruntime or its tools have fused.

    The weights inside the file are not read: the checker would hold them twice.

    Raises OutputFailed for a path that is not UTF-8, which neither the checker nor onnxruntime takes.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise OutputFailed(f"{path} is not UTF-8, and ONNX's libraries take no such path. Name it otherwise") from error
    message = without_large_tensors(path, path.name)
    if _names_other_files(message, path.name):
        _register_schemas()
        onnx.checker.check_model(str(path))
    else:
        check_message(message)


def check_message(message: bytes) -> None:
    """Check a serialised graph with `onnx.checker`, as `check_file` does. Ignores its external data."""
    _register_schemas()
    onnx.checker.check_model(_without_external_data(message))


def innermost_error(error: BaseException) -> BaseException:
    """The error that caused this one, or this one itself."""
    inner = error.__cause__ or error.__context__
    return innermost_error(inner) if inner is not None else error


def _names_other_files(message: bytes, own: str) -> bool:
    """Whether a tensor of the model is in a file of another name."""
    external = (one for one in _tensors(onnx.ModelProto.FromString(message)) if one.data_location == one.EXTERNAL)
    return any(entry.value != own for one in external for entry in one.external_data if entry.key == "location")


def _without_external_data(message: bytes) -> onnx.ModelProto:
    """The model with empty tensors in place of external ones. The checker would look for their files."""
    proto: onnx.ModelProto = onnx.ModelProto.FromString(message)
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.dims[:] = [0] * max(len(tensor.dims), 1)  # a scalar would need one number
    return proto


def _tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """All tensors of a model: initializers and attributes, subgraphs and functions included."""
    graphs, nodes = [proto.graph], [node for function in proto.functions for node in function.node]
    tensors: list[onnx.TensorProto] = []
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            tensors += graph.initializer
            nodes += graph.node
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            tensors += [attribute.t, *attribute.tensors] if attribute.HasField("t") else attribute.tensors
            graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
        nodes = []
    return tensors


@functools.cache
def _register_schemas() -> None:
    """Declare SimplifiedLayerNormalization (RMSNorm), and LayerNormalization before opset 17, as onnxruntime does."""
    for name, inputs, outputs in (
        ("SimplifiedLayerNormalization", ("X", "scale"), ("Y", "inv_std_var")),
        ("LayerNormalization", ("X", "Scale", "B"), ("Y", "Mean", "InvStdDev")),
    ):
        if not defs.has(name, 1, ""):
            defs.register_schema(_schema(name, inputs, outputs))


def _schema(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> defs.OpSchema:
    parameter, optional = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption.Optional
    types = defs.OpSchema.AttrType
    return defs.OpSchema(
        name,
        "",
        1,
        inputs=[parameter(name, "T") for name in inputs[:2]]
        + [parameter(name, "T", "", param_option=optional) for name in inputs[2:]],
        outputs=[parameter(outputs[0], "T")]
        + [parameter(name, "U", "", param_option=optional) for name in outputs[1:]],
        type_constraints=[("T", FLOAT_TYPES, ""), ("U", FLOAT_TYPES, "")],
        attributes=[
            defs.OpSchema.Attribute("axis", types.INT, "", required=False),
            defs.OpSchema.Attribute("epsilon", types.FLOAT, "", required=False),
            defs.OpSchema.Attribute("stash_type", types.INT, "", required=False),
        ],
    )
