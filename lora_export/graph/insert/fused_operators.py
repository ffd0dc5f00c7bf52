"""onnxruntime's FusedGemm, taken apart: a branch of its own for each row of the batch is then beside the product."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from lora_export.graph.insert.node_factory import NodeFactory
from lora_export.graph.operators import MICROSOFT, operator_id
from lora_export.graph.site import Site

# Activation -> the attributes of ONNX's operator of that name, by their names in FusedGemm
ACTIVATION_ATTRIBUTES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        **{name: {} for name in ("Relu", "Tanh", "Sigmoid", "Softplus", "Softsign")},
        **{name: {"alpha": "activation_alpha"} for name in ("LeakyRelu", "Elu", "ThresholdedRelu")},
        "HardSigmoid": {"alpha": "activation_alpha", "beta": "activation_beta"},
    }
)


def take_apart(factory: NodeFactory, site: Site) -> None:
    """Make a site's FusedGemm a Gemm and its activation; nothing for another operator or an unknown activation."""
    node = site.node
    if not site.accepts_changed_weight or operator_id(node) != (MICROSOFT, "FusedGemm"):
        return
    name, product = node.attributes.get_string("activation", ""), node.outputs[0]
    if name not in ACTIVATION_ATTRIBUTES:
        return
    given = {own: node.attributes.get(fused) for own, fused in ACTIVATION_ATTRIBUTES[name].items()}
    attributes = {own: ir.AttrFloat32(own, each.as_float()) for own, each in given.items() if each is not None}
    node.domain, node.op_type = "", "Gemm"
    for each in [each for each in node.attributes if each.startswith("activation")]:
        del node.attributes[each]
    uses = product.uses()
    activation = factory.node(name, [product], f"/{node.name}", product.shape, attributes)
    assert node.graph is not None
    node.graph.insert_after(node, [activation])
    for reader, index in uses:
        reader.replace_input_with(index, activation.outputs[0])
    factory.replace_graph_outputs(product, activation.outputs[0])
