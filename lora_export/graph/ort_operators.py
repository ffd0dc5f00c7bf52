"""What has to be known of onnxruntime's own operators: those in ONNX's domain, and what attention says of its cache."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir
from onnx import defs

FLOATS = ["tensor(bfloat16)", "tensor(double)", "tensor(float)", "tensor(float16)"]


def head_size(cache: ir.Value) -> int:
    """Features of an attention's head, from onnxruntime's operator that reads the cache; 0 where none does."""
    for node, _ in cache.uses():
        heads, groups = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
        query = node.inputs[0]
        width = query.shape[-1] if heads and groups and query is not None and query.shape is not None else None
        if isinstance(width, int):
            packed = len(node.inputs) < 2 or node.inputs[1] is None  # keys and values lie beside the queries
            return width // (heads + 2 * groups if packed else heads)
    return 0


def check_model(model: onnx.ModelProto | str) -> None:
    """As `onnx.checker.check_model`, for graphs that onnxruntime or its tools have fused, too."""
    _register()
    onnx.checker.check_model(model)


@functools.cache
def _register() -> None:
    """SimplifiedLayerNormalization (RMSNorm), and LayerNormalization before opset 17, as onnxruntime declares them."""
    for name, inputs, outputs in (
        ("SimplifiedLayerNormalization", ("X", "scale"), ("Y", "inv_std_var")),
        ("LayerNormalization", ("X", "Scale", "B"), ("Y", "Mean", "InvStdDev")),
    ):
        if not defs.has(name, 1, ""):
            defs.register_schema(_schema(name, inputs, outputs))


def _schema(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> defs.OpSchema:
    parameter, optional = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption.Optional
    kinds = defs.OpSchema.AttrType
    return defs.OpSchema(
        name,
        "",
        1,
        inputs=[parameter(name, "T") for name in inputs[:2]]
        + [parameter(name, "T", "", param_option=optional) for name in inputs[2:]],
        outputs=[parameter(outputs[0], "T")]
        + [parameter(name, "U", "", param_option=optional) for name in outputs[1:]],
        type_constraints=[("T", FLOATS, ""), ("U", FLOATS, "")],
        attributes=[
            defs.OpSchema.Attribute("axis", kinds.INT, "", required=False),
            defs.OpSchema.Attribute("epsilon", kinds.FLOAT, "", required=False),
            defs.OpSchema.Attribute("stash_type", kinds.INT, "", required=False),
        ],
    )
