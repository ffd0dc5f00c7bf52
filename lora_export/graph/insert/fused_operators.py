"""onnxruntime's fused operators, taken apart: a branch is then inserted beside their product.

On the CPU the parts compute the operator's bits. Attention's sums begin with the bias, as those of a Gemm do, and those
of MatMul do not. Without any mask, MultiHeadAttention computes in another order, so it gets one that hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from lora_export.graph.insert.batch_axis import infer_shapes
from lora_export.graph.insert.node_factory import MIN_OPSET, MIN_ROWS_OPSET, Dim, NodeFactory, NodeList, fixed_sizes
from lora_export.graph.operators import MICROSOFT, operator_id
from lora_export.graph.site import Site
from lora_export.graph.values import unused_name

# Activation -> the attributes of ONNX's operator of that name, by their names in FusedGemm
GEMM_ACTIVATIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        **{name: {} for name in ("Relu", "Tanh", "Sigmoid", "Softplus", "Softsign")},
        **{name: {"alpha": "activation_alpha"} for name in ("LeakyRelu", "Elu", "ThresholdedRelu")},
        "HardSigmoid": {"alpha": "activation_alpha", "beta": "activation_beta"},
    }
)
# Activation -> its attributes, in the order of FusedConv's `activation_params`. Those of Clip are inputs.
CONVOLUTION_ACTIVATIONS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        **dict.fromkeys(("Relu", "Tanh", "Sigmoid"), ()),
        "LeakyRelu": ("alpha",),
        "HardSigmoid": ("alpha", "beta"),
        "Clip": ("min", "max"),
    }
)
OF_HEADS = ("num_heads", "unidirectional", "mask_filter_value", "scale")  # Attention's attributes of the same meaning
ATTENTION_INPUTS = ("x", "weights", "bias", "mask", "past", "added", "past_length")
MOST_MASK_DIMENSIONS = 3  # of MultiHeadAttention; Attention has one more, for CUDA
QKV_SIZES = "qkv_hidden_sizes"


def take_apart(factory: NodeFactory, site: Site, *, reads_changed: bool) -> None:
    """Make a site's fused operator its product, which stays the site's node, and the nodes that follow it.

    Nothing for another operator, and for one whose parts would compute something else. With `reads_changed`, nothing
    either for an operator that can read a changed weight. Attention needs opset 15.
    """
    parts = TAKEN_APART.get(operator_id(site.node))
    is_plain = site.is_linear and site.index == 1 and site.inner_node is None and site.quantised is None
    if parts is not None and is_plain and not (reads_changed and site.accepts_changed_weight):
        parts(factory, site.node)


def _product(factory: NodeFactory, node: ir.Node) -> None:
    """FusedGemm as Gemm and its activation."""
    name = node.attributes.get_string("activation", "")
    if name not in GEMM_ACTIVATIONS:
        return
    given = {own: node.attributes.get(fused) for own, fused in GEMM_ACTIVATIONS[name].items()}
    attributes = {own: ir.AttrFloat32(own, each.as_float()) for own, each in given.items() if each is not None}
    _become(node, "Gemm", [each for each in node.attributes if each.startswith("activation")])
    _activate(factory, node, name, (), attributes)


def _convolution(factory: NodeFactory, node: ir.Node) -> None:
    """FusedConv as Conv and its activation. One that adds another value before the activation stays."""
    name, numbers = node.attributes.get_string("activation", ""), node.attributes.get_floats("activation_params", ())
    if name not in CONVOLUTION_ACTIVATIONS or len(node.inputs) > len(("x", "weight", "bias")):
        return
    given = dict(zip(CONVOLUTION_ACTIVATIONS[name], numbers, strict=False))
    _become(node, "Conv", ["activation", "activation_params"])
    if name == "Clip":
        factory.require_opset(MIN_OPSET, "an adapter beside FusedConv")
        limits = [factory.constant(f"/{node.name}", key, np.array(each, np.float32)) for key, each in given.items()]
        _activate(factory, node, name, limits, {})
    else:
        _activate(factory, node, name, (), {key: ir.AttrFloat32(key, each) for key, each in given.items()})


def _activate(
    factory: NodeFactory, node: ir.Node, name: str, limits: Sequence[ir.Value], attributes: Mapping[str, ir.Attr]
) -> None:
    product, nodes = node.outputs[0], NodeList(factory, f"/{node.name}")
    activated = nodes.add(name, [product, *limits], product.shape, None, attributes)
    _follow(factory, node, nodes, {product: activated})


def take_attention_apart(factory: NodeFactory, node: ir.Node) -> None:
    """As `take_apart`, for a node that is an Attention; nothing for another, or where the opset is below 15."""
    if operator_id(node) == (MICROSOFT, "Attention") and factory.model.opset_imports.get("", 0) >= MIN_ROWS_OPSET:
        _attention(factory, node)


def _attention(factory: NodeFactory, node: ir.Node) -> None:
    """Attention as the Gemm of q, k and v, and MultiHeadAttention."""
    (mask,) = _attention_inputs(node, "mask")
    if mask is not None and mask.shape is None and not factory.has_inferred_shapes:
        factory.has_inferred_shapes = True  # another time would infer no more
        infer_shapes(factory.model)
    if why_attention_stays(node):
        return
    x, w, mask, past, added = _attention_inputs(node, "x", "weights", "mask", "past", "added")
    assert x is not None and w is not None
    heads = {name: attribute for name, attribute in node.attributes.items() if name in OF_HEADS}
    is_causal = node.attributes.get_int("unidirectional", 0) == 1
    sizes = node.attributes.get_ints(QKV_SIZES, [fixed_sizes(w, 1)[0] // 3] * 3)
    (y, *presents), y_shape = node.outputs, node.outputs[0].shape
    _flatten_input(factory, node, x)
    _become(node, "Gemm", list(node.attributes))
    y.shape = None if x.shape is None else ir.Shape([None, sum(sizes)])
    nodes = NodeList(factory, f"/{node.name}")
    if mask is None and past is None and added is None and not is_causal:
        mask = _whole_lengths(nodes, x)
    caches = [None, None] if past is None else [_half(nodes, past, number) for number in (0, 1)]
    given = [*_separated(nodes, y, x, sizes), None, mask, added, *caches]
    attended, *halves = _several(nodes, "MultiHeadAttention", given, 3 if presents else 1, heads, MICROSOFT)
    attended.shape = y_shape
    news = {y: attended}
    for present in presents:
        wide = [nodes.add("Unsqueeze", [half, _numbers(nodes, 0)], None) for half in halves]
        news[present] = nodes.add("Concat", wide, present.shape, axis=0)
    _follow(factory, node, nodes, news)
    node.resize_outputs(1)


def why_attention_stays(node: ir.Node) -> str:
    """Why an Attention is not taken apart; empty where it is, and for another operator."""
    if operator_id(node) != (MICROSOFT, "Attention"):
        return ""
    x, w, mask, past_length = _attention_inputs(node, "x", "weights", "mask", "past_length")
    if x is None or w is None or w.shape is None or not w.shape.is_static():
        return "weights of an unknown shape"
    if attribute := next((each for each in node.attributes.values() if _is_unknown(each)), None):
        return f"{attribute.name} = {attribute.value}"  # as rotary positions, or a past in a larger buffer
    if past_length is not None:
        return "a past in a larger buffer"
    return "" if mask is None or _is_lengths_of_embedding(mask) else _mask_obstacle(mask, x)


def _attention_inputs(node: ir.Node, *names: str) -> list[ir.Value | None]:
    given = dict(zip(ATTENTION_INPUTS, node.inputs, strict=False))
    return [given.get(name) for name in names]


def _is_unknown(attribute: ir.Attr) -> bool:
    return attribute.name not in (*OF_HEADS, QKV_SIZES) and bool(attribute.value)


def _is_lengths_of_embedding(mask: ir.Value) -> bool:
    """Whether a mask is that of onnxruntime's embedding: one length for each row. ONNX infers no shape for it."""
    node = mask.producer()
    is_embedding = node is not None and operator_id(node) == (MICROSOFT, "EmbedLayerNormalization")
    return is_embedding and mask.index() == 1


def _mask_obstacle(mask: ir.Value, x: ir.Value) -> str:
    """Why MultiHeadAttention cannot take a mask; empty where it can. Of one dimension, it takes the lengths of rows."""
    if not mask.shape:  # of no dimension, where a file gives none
        return "a mask of an unknown shape"
    if len(mask.shape) > MOST_MASK_DIMENSIONS:
        return f"a mask of {len(mask.shape)} dimensions"
    of_rows = x.shape is not None and not x.shape.is_unknown_dim(0) and mask.shape[0] == x.shape[0]
    if len(mask.shape) != 1 or of_rows:
        return ""
    return f"a mask of the shape {mask.shape}, which is not one length for each row of the batch"


def _flatten_input(factory: NodeFactory, node: ir.Node, x: ir.Value) -> None:
    """Let a node read the tokens of x (batch, tokens, features) in one dimension, and its weight and bias alone."""
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert weight is not None and node.graph is not None
    nodes, features = NodeList(factory, f"/{node.name}"), fixed_sizes(weight, 0)[0]
    shape: list[Dim] | None = None if x.shape is None else [ir.SymbolicDim(None), features]
    rows = nodes.add("Reshape", [x, _numbers(nodes, -1, features)], shape)
    node.graph.insert_before(node, nodes.nodes)
    node.resize_inputs(2 if bias is None else 3)
    node.replace_input_with(0, rows)


def _separated(nodes: NodeList, product: ir.Value, x: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
    """q, k and v (batch, tokens, features) of the product (batch · tokens, features of all)."""
    tokens = nodes.add("Shape", [x], [2], ir.DataType.INT64, start=0, end=2)
    shape = nodes.add("Concat", [tokens, _numbers(nodes, sum(sizes))], [3], axis=0)
    separated = nodes.add("Reshape", [product, shape], None if x.shape is None else [*x.shape[:2], sum(sizes)])
    return _several(nodes, "Split", [separated, _numbers(nodes, *sizes)], 3, {"axis": ir.AttrInt64("axis", -1)})


def _whole_lengths(nodes: NodeList, x: ir.Value) -> ir.Value:
    """The number of tokens of x (batch, tokens, features), for each row of the batch: int32 (batch)."""
    length = nodes.add("Shape", [x], [1], ir.DataType.INT64, start=1, end=2)
    rows = nodes.add("Shape", [x], [1], ir.DataType.INT64, start=0, end=1)
    return nodes.add("Expand", [nodes.cast(length, ir.DataType.INT32), rows], None)


def _half(nodes: NodeList, past: ir.Value, number: int) -> ir.Value:
    """The keys (0) or values (1) of a past (2, batch, heads, tokens, features)."""
    index = nodes.constant("half", np.array(number, np.int64))
    return nodes.add("Gather", [past, index], None if past.shape is None else past.shape[1:], axis=0)


def _numbers(nodes: NodeList, *numbers: int) -> ir.Value:
    return nodes.constant("numbers", np.array(numbers, np.int64))


def _several(
    nodes: NodeList,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    count: int,
    attributes: Mapping[str, ir.Attr],
    domain: str = "",
) -> Sequence[ir.Value]:
    """The outputs of a new node that has several, of the type of its first input."""
    assert inputs[0] is not None
    name = unused_name(f"{nodes.path}/{op_type}", nodes.factory.node_names)
    names = [unused_name(f"{name}_output_{number}", nodes.factory.value_names) for number in range(count)]
    outputs = [ir.Value(name=each, type=inputs[0].type) for each in names]
    nodes.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=outputs, name=name))
    return outputs


def _become(node: ir.Node, op_type: str, lost: Sequence[str]) -> None:
    """Make a node one of ONNX's operators, without these attributes."""
    node.domain, node.op_type = "", op_type
    for name in lost:
        node.attributes.pop(name, None)


def _follow(factory: NodeFactory, node: ir.Node, nodes: NodeList, news: Mapping[ir.Value, ir.Value]) -> None:
    """Insert nodes behind a node, and let the readers of its outputs read what they compute."""
    assert node.graph is not None
    node.graph.insert_after(node, nodes.nodes)
    own = set(nodes.nodes)
    for old, new in news.items():
        for reader, index in old.uses():
            if reader not in own:
                reader.replace_input_with(index, new)
        factory.replace_graph_outputs(old, new)


TAKEN_APART: Mapping[tuple[str, str], Callable[[NodeFactory, ir.Node], None]] = MappingProxyType(
    {(MICROSOFT, "FusedGemm"): _product, (MICROSOFT, "FusedConv"): _convolution, (MICROSOFT, "Attention"): _attention}
)
