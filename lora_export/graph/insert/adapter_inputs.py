"""Mode `inputs`: A and B as optional inputs of the graph, which onnxruntime fills from an adapter file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import onnx_ir as ir

from lora_export.errors import InputRefused
from lora_export.formats.onnx_adapter import CONTRACT_KEY, AdapterSlot, Contract
from lora_export.graph.find_sites import Sites
from lora_export.graph.insert.adapter_names import (
    CONVENTIONS,
    DORA_FACTOR,
    LORA_A,
    LORA_B,
    Convention,
    dotted,
    module_of,
)
from lora_export.graph.insert.base_fingerprint import fingerprint, names_digest, quantisation_of, weight_digests
from lora_export.graph.insert.branches import common_rescaling
from lora_export.graph.insert.inserter import Inserter
from lora_export.graph.insert.node_factory import Factor, NodeFactory
from lora_export.graph.site import Site, common_dtype
from lora_export.options.export import OnnxOptions
from lora_export.plan import Layout

MIN_IR_VERSION = 4  # before it, every initializer had to be an input, and no input was optional


def insert_inputs(
    model: ir.Model,
    sites: Sites,
    weights: Iterable[str],
    *,
    names: str = OnnxOptions.names,
    dora: Iterable[str] = (),
    max_rank: int = 0,
    required: bool = False,
) -> Contract:
    """Give the layers of these weights A and B as optional inputs, in memory. See `AdapterSlot` for the shapes.

    Each input has an initializer of the same name as its default. The default has rank 0 (a convolution's has one rank
    of zeros), so that without an adapter the layer gains zeros and the graph computes what it did. The rank of each
    layer has a symbol of its own, so that an adapter's ranks may differ. With `max_rank` every rank is this one, and
    the default is zeros: no shape of an adapter is dynamic. With `required` there is no default. The weights in `dora`
    also get an input for the factor of each output, by default ones, which multiplies the sum before the bias is added.
    `names` is one of CONVENTIONS. The returned contract lists the inputs, their positions and the base's fingerprint.
    It is stored in the graph's metadata too. `sites` is invalid afterwards.

    Reads all weights of the base for their fingerprint. Raises InputRefused where a weight has a reader beside which no
    branch can be inserted, where the graph has an input of that name already, and for a graph in an IR version without
    optional inputs. The graph is then partly changed and must not be used.
    """
    if model.ir_version < MIN_IR_VERSION:
        raise InputRefused(
            f"the graph has IR version {model.ir_version}, which has no optional inputs: convert it to version "
            f"{MIN_IR_VERSION} or later"
        )
    if CONTRACT_KEY in model.metadata_props:
        raise InputRefused("the graph has inputs for adapters already: start from the graph without them")
    digests, with_dora = weight_digests(sites), set(dora)
    inserter, slots = Inserter(model), []
    for weight in weights:
        readers = sites.by_name.get(weight, ())  # none for a part of a weight, which `sites_of` refuses
        is_embedding = bool(readers) and all(site.layout is Layout.EMBEDDING for site in readers)
        own_sites = inserter.sites_of(weight, sites, is_embedding=is_embedding, allow_changed_weight=True)
        has_dora, name_of = weight in with_dora, CONVENTIONS[names]
        slot = _slot(weight, own_sites, name_of, digests[weight], embedding=is_embedding, dora=has_dora)
        slot = replace(slot, max_rank=max_rank)
        a, b, *factor = _add_inputs(inserter.factory, slot)
        for site in own_sites:
            rescaling = common_rescaling(inserter.factory, site, factor[0]) if factor else None
            inserter.insert(site, [(a, b)], rescaling)
        slots.append(slot)
    inserter.finish()
    contract = Contract(fingerprint(digests), names_digest(sites), tuple(slots), required)
    for name in contract.inputs if required else ():
        model.graph.initializers.pop(name).const_value = None
    model.metadata_props[CONTRACT_KEY] = str(contract)
    return contract


def _slot(
    weight: str, sites: Sequence[Site], name_of: Convention, digest: str, *, embedding: bool, dora: bool
) -> AdapterSlot:
    site, module = sites[0], module_of(weight)
    return AdapterSlot(
        weight,
        a=name_of(module, LORA_A, embedding),
        b=name_of(module, LORA_B, embedding),
        shape=site.shape[::-1] if embedding or site.layout is Layout.IN_OUT else site.shape,
        dtype=common_dtype(sites),
        digest=digest,
        factor=name_of(module, DORA_FACTOR, embedding) if dora else "",
        embedding=embedding,
        value=site.value.name or "",
        block=(site.block.start, site.block.stop) if site.block is not None else None,
        quantised=quantisation_of(site),
    )


def _add_inputs(factory: NodeFactory, slot: AdapterSlot) -> list[Factor]:
    """Add the inputs of a layer: A, B, and the factor of DoRA where the layer takes one."""
    module = module_of(slot.weight)
    # A symbol of its own: onnxruntime lets tensors of equal symbols share memory.
    rank = dotted(module, "lora_r")
    factors = []
    for part, (name, array) in zip((LORA_A, LORA_B, DORA_FACTOR), slot.without_adapter().items(), strict=False):
        factor = factory.factor(module, part, array, name=name)
        factor.value.shape = ir.Shape([rank if size is None else size for size in slot.input_shapes[name]])
        factory.model.graph.inputs.append(factor.value)
        factors.append(factor)
    return factors
