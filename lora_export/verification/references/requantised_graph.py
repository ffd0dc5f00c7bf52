"""A graph with the quantised weights of a candidate, as the reference of a merge into quantised weights.

A reference in floats is as far from such a candidate as its rounding. So each weight that the adapters change is
judged by its numbers: in few bits, each is the nearest to W + s·BA that the candidate's scales allow; as floats, it is
W + s·BA rounded once. W is the base's dequantised weight, the sum is computed here in fp64. Then the base graph with
these weights is the reference of everything else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_export.graph.exporter_names import PROMOTED_FROM
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.quantised_weights import MATMUL_NBITS
from lora_export.graph.site import Site
from lora_export.graph.values import new_initializer, unused_name, value_names
from lora_export.plan import Layout, Plan, Step
from lora_export.verification import parity
from lora_export.verification.references.expected_weight import ExpectedWeight, StoredForm, sum_in_fp64
from lora_export.verification.references.graph_fp64 import dequantise
from lora_export.verification.references.graph_with_adapter import sum_at_weights
from lora_export.verification.references.quantisation_error import NearestNumbers, quantisation_error_of


def sites_by_integers(sites: Sites) -> dict[str, Site]:
    """The sites of quantised weights by the names of their integers; of promoted ones, by those that these had."""
    every = (*(site for readers in sites.by_name.values() for site in readers), *sites.unnamed)
    origins = ((site.value.metadata_props.get(PROMOTED_FROM), site) for site in every)
    return {origin: site for origin, site in origins if origin is not None} | {
        str(site.value.name): site for site in every if site.quantised is not None
    }


@dataclass(frozen=True, eq=False)
class RequantisedGraph:
    """The candidate of a merge into quantised weights."""

    candidate: ir.Model

    @functools.cached_property
    def _sites(self) -> Sites:
        return find_sites(self.candidate)

    def _own(self, step: Step, site: Site) -> Site | None:
        """The candidate's site in the place of one of the base: by the name of the integers, or of the weight."""
        by_name = self._sites.by_name.get(step.weight, ())
        found = sites_by_integers(self._sites).get(str(site.value.name)) or next(iter(by_name), None)
        return found if found is not None and found.stored_shape == site.stored_shape else None

    def insert(self, model: ir.Model, sites: Sites, plan: Plan) -> list[str]:
        """Put the candidate's quantised weights into the base graph, and W + ΔW at all others. Returns no notes."""
        changed = list(_changed(sites, plan.steps))
        found = [(site.holder, self._own(step, site)) for step, site in changed]
        quantised = [step for step, _ in changed]
        sum_at_weights(model, sites, replace(plan, steps=tuple(step for step in plan.steps if step not in quantised)))
        for node, own in dict(found).items():
            if own is not None:
                assert isinstance(node, ir.Node)
                _use_weight(model, node, own)
        return []

    def faults(self, sites: Sites, plan: Plan) -> Iterator[str]:
        """What is wrong with the weights that the adapters change. `sites` are those of the base."""
        judged = {site.value: (step, site) for step, site in _changed(sites, plan.steps)}
        for step, site in _changed(sites, plan.steps):
            if judged[site.value][1] is not site and site.block is None:
                continue  # another reader of the same integers
            own = self._own(step, site)
            if own is None:
                yield f"{step.weight}: the candidate has no such weight in the place of the base's {site.value.name}"
                continue
            own = replace(own, block=site.block)
            if wrong := _wrong_numbers(step, site, own):
                nearest = "the nearest to W + s·BA that their scales allow"
                what = "W + s·BA, rounded once" if own.quantised is None else nearest
                yield f"{step.weight}: {wrong:,} of {site.array.size:,} numbers are not {what}"


def _changed(sites: Sites, steps: Iterable[Step]) -> Iterator[tuple[Step, Site]]:
    """The steps on quantised weights, with each site."""
    for step in steps:
        yield from ((step, site) for site in sites.by_name[step.weight] if site.quantised is not None)


def _wrong_numbers(step: Step, site: Site, own: Site) -> int:
    before, values = (np.ascontiguousarray(each.matrix) for each in (site, own))
    step = _of_matrix(step, site, before.shape, str(values.dtype))
    if own.quantised is None:
        return ExpectedWeight(step.spec, lambda: before, (step,)).wrong_in(values, (StoredForm.SUM,)).numbers
    total, eps = sum_in_fp64(step, before), parity.EPS[own.quantised.scale_dtype]
    rounding = NearestNumbers(own.nearest(total), own.steps(total), eps, own.quantised.has_float_zeros)
    return quantisation_error_of(values, total, rounding).misrounded


def _of_matrix(step: Step, site: Site, shape: tuple[int, ...], dtype: str) -> Step:
    """The step on the site's matrix, of this shape and dtype: (out, in), or the rows of a table."""
    layout = site.layout if site.layout is Layout.EMBEDDING else Layout.OUT_IN
    whole, rows = step.replace, step.token_rows
    if step.spec.layout.is_transposed != layout.is_transposed:
        whole, rows = None if whole is None else whole.T, None if rows is None else rows.transposed
    spec = replace(step.spec, shape=shape, layout=layout, dtype=dtype, region=None)
    return replace(step, spec=spec, replace=whole, token_rows=rows)


def _use_weight(model: ir.Model, node: ir.Node, own: Site) -> None:
    """Let a node of the base compute with the weight of the candidate."""
    used = value_names(model)

    def copied(value: ir.Value | None, suffix: str) -> ir.Value | None:
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        name = unused_name(f"{own.value.name}.{suffix}", used)
        return None if tensor is None else new_initializer(model, name, tensor)

    if own.quantised is None:
        floats = copied(own.value, "floats")
        assert floats is not None
        if (product := dequantise(model, node)) is not None:
            turned = ir.node("Transpose", [floats], {"perm": [1, 0]}, name=f"{product.name}.turned")
            assert product.graph is not None
            product.graph.insert_before(product, turned)
            product.replace_input_with(1, turned.outputs[0])
        else:
            ir.convenience.replace_all_uses_with(node.outputs[0], floats)
        return
    theirs = own.quantised.node
    for position in own.quantised.POSITIONS:
        value = theirs.inputs[position] if position < len(theirs.inputs) else None
        if position < len(node.inputs):
            node.replace_input_with(position, copied(value, str(position)))
    if node.op_type == MATMUL_NBITS:
        node.attributes["bits"] = theirs.attributes["bits"]
