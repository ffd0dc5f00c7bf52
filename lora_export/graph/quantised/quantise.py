"""Quantise the linear layers of a graph of floats: onnxruntime's MatMulNBits in place of MatMul and Gemm.

The integers and scales are made by onnxruntime's own quantiser, one layer after another, so that neither the size of a
message nor a second copy of the graph limits the model. A layer keeps its node's name and the exporter's records.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from lora_export.errors import InputRefused, one_line
from lora_export.formats.onnx_adapter import import_quantiser
from lora_export.graph.find_sites import find_sites
from lora_export.graph.operators import MICROSOFT, ONNX, operator_id
from lora_export.graph.quantised_weights import MATMUL_NBITS
from lora_export.graph.site import Site
from lora_export.graph.values import drop_unused
from lora_export.options.spelling import named
from lora_export.plan import Layout

BITS = {"int4": 4, "int8": 8}  # of a weight, by the name of the kind
BLOCK_SIZE = 32  # entries of a row that share a scale
ACCURACY_LEVEL = 1  # products in fp32: at level 4 onnxruntime would round the inputs to int8, too
NAMED_LAYERS = 5  # layers of a note
# Endings of the names of a weight's parts, in the order of MatMulNBits' inputs. Symmetric weights have no zero points.
PART_ENDINGS = ("", "_scales")


def quantise_graph(model: ir.Model, kind: str) -> list[str]:
    """Quantise every linear layer of a graph whose product onnxruntime can compute so; in place.

    `kind` is a key of BITS. Embeddings, a head that is tied to one, convolutions, stacked experts and a matrix that
    layers read as W and as its transpose keep their floats. Returns notes on layers that do. Raises InputRefused for a
    graph without a layer that can be quantised, and EnvironmentLacking without onnxruntime's quantiser. Reads and
    replaces one weight after another.
    """
    bits, sites = BITS[kind], find_sites(model)
    layers = {id(site.node): site for site in (*sites.linear, *sites.unnamed)}
    inputs = set(model.graph.inputs)  # among them those of adapters, with a default value
    # Read by something else than a product, too: the table of words, tied to the head.
    others = [site for readers in sites.by_name.values() for site in readers if not site.is_linear]
    shared = {name for site in others for name in (site.name, site.value.name) if name}
    ways: dict[ir.Value, set[Layout]] = {}
    for site in layers.values():
        ways.setdefault(site.value, set()).add(site.layout)
    suited = [
        site
        for site in layers.values()
        if _is_suited(site)
        and len(ways[site.value]) == 1
        and site.value not in inputs
        and not {site.value.name, site.name} & shared
        and all(id(node) in layers for node in _readers(site.value))
    ]
    if not suited:
        raise InputRefused(
            f"{named('quantize', kind)} finds no layer to quantise: {MATMUL_NBITS} computes a MatMul or Gemm with a "
            "matrix of floats (not double) that is no input of the graph, and the graph has none"
        )
    made: dict[ir.Value, dict[str, Any]] = {}
    for site in suited:
        if site.value not in made:
            made[site.value] = _quantised(site, bits)
        _replace(model, site, bits, made[site.value])
    drop_unused(made)
    model.opset_imports.setdefault(MICROSOFT, 1)
    left = [site.name or site.location for site in layers.values() if site not in suited]
    more = " and more" if left[NAMED_LAYERS:] else ""
    return [one_line(f"not quantised: {', '.join(left[:NAMED_LAYERS])}{more}")] if left else []


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a value, also through a Transpose."""
    for node, _ in value.uses():
        if operator_id(node) == (ONNX, "Transpose"):
            yield from _readers(node.outputs[0])
        else:
            yield node


def _is_suited(site: Site) -> bool:
    is_whole = site.block is None and site.expert is None and site.inner_node is None and site.quantised is None
    is_matrix = is_whole and site.index == 1 and site.is_linear and len(site.stored_shape) == 2
    if not is_matrix or not site.value.is_initializer() or site.dtype == "float64":  # MatMulNBits has no double
        return False
    attributes = site.node.attributes
    if operator_id(site.node) == (ONNX, "MatMul"):
        return True
    is_plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    return operator_id(site.node) == (ONNX, "Gemm") and is_plain and not attributes.get_int("transA", 0)


def _quantised(site: Site, bits: int) -> dict[str, Any]:
    """What onnxruntime's quantiser makes of a layer: its attributes, and its tensors by their place in PART_ENDINGS."""
    weight = site.matrix.T  # (in, out)
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", kind, ["n", weight.shape[0]])],
        [helper.make_tensor_value_info("y", kind, ["n", weight.shape[1]])],
        [numpy_helper.from_array(weight.copy(), "w")],
    )
    layer = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    with _silence():
        tool = import_quantiser()(
            layer, bits=bits, block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=ACCURACY_LEVEL
        )
        tool.process()
    made: onnx.ModelProto = tool.model.model
    (node,) = made.graph.node
    tensors = {tensor.name: ir.from_proto(tensor) for tensor in made.graph.initializer}
    attributes = [ir.from_proto(attribute) for attribute in node.attribute]
    return {"attributes": attributes, "tensors": [tensors[name] for name in node.input[1:]]}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discard the quantiser's log, and the handler that it adds for all programs when it is imported."""
    root, disabled = logging.root, logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def _replace(model: ir.Model, site: Site, bits: int, made: dict[str, Any]) -> None:
    """Put MatMulNBits in the place of a layer's node, and an Add behind it where that was a Gemm with a bias."""
    old = site.node
    graph = old.graph
    assert graph is not None
    parts = list(_parts(model, site, bits, made))
    node = ir.Node(MICROSOFT, MATMUL_NBITS, [old.inputs[0], *parts], made["attributes"], name=old.name)
    node.metadata_props.update(old.metadata_props)
    nodes = [node]
    if len(old.inputs) > 2 and old.inputs[2] is not None:
        nodes.append(ir.Node("", "Add", [node.outputs[0], old.inputs[2]], name=f"{old.name}_bias"))
        nodes[0].outputs[0].name = f"{old.outputs[0].name}_product"
        nodes[0].outputs[0].type = old.outputs[0].type
        nodes[0].outputs[0].shape = old.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, old, [old], nodes, old.outputs, nodes[-1].outputs)


def _parts(model: ir.Model, site: Site, bits: int, made: dict[str, Any]) -> Iterator[ir.Value]:
    name = f"{site.name or site.value.name}_Q{bits}"
    for ending, tensor in zip(PART_ENDINGS, made["tensors"], strict=True):
        own = name + ending
        if own not in model.graph.initializers:
            tensor.name = own
            value = ir.Value(name=own, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            model.graph.register_initializer(value)
        yield model.graph.initializers[own]
