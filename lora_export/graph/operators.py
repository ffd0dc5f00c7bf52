"""The operators that read a weight: at which input, and how the matrix is stored for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from lora_export.graph.quantised_weights import MATMUL_NBITS
from lora_export.graph.values import is_stored
from lora_export.plan import Layout

MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators
ONNX = ""
# Operators that multiply by a matrix at input 1, (in, out) unless `transB` is set.
MATRIX_PRODUCTS = frozenset({(ONNX, "MatMul"), (ONNX, "Gemm"), (MICROSOFT, "FusedMatMul"), (MICROSOFT, "FusedGemm")})
# Those of them that accept the matrix at input 0 too: y = W x.
COMMUTING_PRODUCTS = frozenset({(ONNX, "MatMul"), (MICROSOFT, "FusedMatMul")})
# onnxruntime's attention has q, k and v in one (in, out) matrix at input 1. The graph does not expose their product.
ATTENTIONS = frozenset(
    {(MICROSOFT, "Attention"), (MICROSOFT, "PackedAttention"), (MICROSOFT, "DecoderMaskedSelfAttention")}
)
CONVOLUTIONS = frozenset({(ONNX, "Conv"), (MICROSOFT, "FusedConv")})
# These multiply by a matrix at input 1 and compute more in the same node. A branch cannot be added to their product;
# ΔW can be added to the matrix that they read.
FUSED_PRODUCTS = ATTENTIONS | {(MICROSOFT, "FusedMatMul"), (MICROSOFT, "FusedGemm")}
# These compute all experts of a layer. Their weights have names and a layout of their own.
FUSED_EXPERTS = frozenset({(MICROSOFT, "MoE"), (MICROSOFT, "QMoE")})
# The input at which an operator adds a bias.
BIAS_INPUTS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("Gemm", "Conv", "FusedGemm", "FusedConv", *(name for _, name in ATTENTIONS)), 2),
        MATMUL_NBITS: 5,
    }
)
# The same of onnxruntime's operators that add the bias of a layer before them.
LATER_BIAS_INPUTS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("BiasGelu", "FastGelu"), 1),
        "MultiHeadAttention": 3,
        **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), 4),
    }
)
# The input at which an operator reads quantised integers. Not all of them are supported.
QUANTISED_INPUTS: Mapping[str, int] = MappingProxyType(
    {
        MATMUL_NBITS: 1,
        "MatMulBnb4": 1,
        "MatMulInteger": 1,
        "MatMulIntegerToFloat": 1,
        "QLinearMatMul": 3,
        "ConvInteger": 1,
        "QLinearConv": 3,
        "DequantizeLinear": 0,
        "GatherBlockQuantized": 0,
    }
)


def operator_id(node: ir.Node) -> tuple[str, str]:
    """Domain and operator. ONNX's own domain is the empty string."""
    return ONNX if node.domain == "ai.onnx" else node.domain, node.op_type


def layout_at(node: ir.Node, index: int, rank: int) -> Layout:
    """How a tensor of this rank is stored for a node that reads it at this input."""
    operator = operator_id(node)
    if operator in CONVOLUTIONS and index == 1 and rank > 2:
        return Layout.OUT_IN  # (out, in, kernel)
    if rank != 2:
        return Layout.OTHER
    if operator == (ONNX, "Gather") and index == 0 and _axis(node) == 0:
        return Layout.EMBEDDING
    if operator in ATTENTIONS and index == 1:
        return Layout.IN_OUT
    transposed = _flag(node, "transB" if index == 1 else "transA")
    if transposed is None or _flag(node, "transBatchA") or _flag(node, "transBatchB"):
        return Layout.OTHER
    if operator in MATRIX_PRODUCTS and index == 1:
        return Layout.OUT_IN if transposed else Layout.IN_OUT
    if operator in COMMUTING_PRODUCTS and index == 0 and not is_stored(node.inputs[1]):
        return Layout.IN_OUT if transposed else Layout.OUT_IN
    return Layout.OTHER


def product_factor(node: ir.Node) -> float:
    """The number by which a node multiplies its product with a matrix: `alpha` of Gemm and FusedMatMul."""
    return node.attributes.get_float("alpha", 1.0) if operator_id(node) in MATRIX_PRODUCTS else 1.0


def node_bias(node: ir.Node, inputs: Mapping[str, int] = BIAS_INPUTS) -> ir.Value | None:
    """The bias that a node adds; None where it adds none. `inputs` has the input of each operator."""
    index = inputs.get(node.op_type, len(node.inputs))
    return node.inputs[index] if index < len(node.inputs) else None


def bias_factor(node: ir.Node) -> float:
    """The number by which a node multiplies the bias that it adds: `beta` of Gemm. 1 for a node without a bias."""
    has_beta = node_bias(node) is not None and operator_id(node) in MATRIX_PRODUCTS
    return node.attributes.get_float("beta", 1.0) if has_beta else 1.0


def transposed_layout(layout: Layout) -> Layout:
    """The layout of a matrix on the other side of a Transpose."""
    return {Layout.IN_OUT: Layout.OUT_IN, Layout.OUT_IN: Layout.IN_OUT}.get(layout, Layout.OTHER)


def cache_heads(cache: ir.Value) -> tuple[int, int]:
    """The heads of a cache and their features, from the onnxruntime operator that reads it. 0 where none tells it."""
    for node, _ in cache.uses():
        heads, groups = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
        if not heads or not groups:
            continue
        query = node.inputs[0]
        width = query.shape[-1] if query is not None and query.shape is not None else None
        if isinstance(width, int):
            packed = len(node.inputs) < 2 or node.inputs[1] is None  # q, k and v are one tensor
            return groups, width // (heads + 2 * groups if packed else heads)
        read = (_features_read(reader) for reader, index in node.outputs[0].uses() if index == 0)
        return groups, next(filter(None, read), 0) // heads
    return 0, 0


def _features_read(node: ir.Node) -> int:
    """The features of the rows that a product with a weight multiplies. 0 for another operator."""
    if node.op_type == MATMUL_NBITS:
        return node.attributes.get_int("K", 0)
    weight = node.inputs[1] if operator_id(node) in MATRIX_PRODUCTS else None
    shape = None if weight is None else weight.shape
    size = shape[1 if _flag(node, "transB") else 0] if shape is not None and len(shape) == 2 else 0
    return size if isinstance(size, int) else 0


def _axis(node: ir.Node) -> int | None:
    attribute = node.attributes.get("axis")
    return None if attribute is not None and attribute.is_ref() else node.attributes.get_int("axis", 0)


def _flag(node: ir.Node, name: str) -> bool | None:
    """A boolean attribute. None where the caller of a function sets it, or where it is not an integer."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return False
    return None if attribute.is_ref() or attribute.type != ir.AttributeType.INT else attribute.as_int() == 1
