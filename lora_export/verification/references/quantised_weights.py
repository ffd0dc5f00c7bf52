"""The weights that a quantised graph computes with, given to every run that it is compared with.

A graph of few bits is as far from its model as its rounding, and an adapter beside it is not to blame for that.
To tell the two apart, the reference, PyTorch as deployed and the controls all compute with the graph's own weights,
dequantised. This module has its own reader of the format. The gates stay as tight as for floats. The verdict's
notes give the distance of the weights from the model's. `quantisation_error.py` judges whether they are its rounding.

Where adapters were merged into the quantised weights, the reference merges them too, in fp64: W + s·BA, each entry
at the nearest number that the graph's own scales allow. W is the graph's weight before the merge (`origin`), or the
model's weight where the sum was quantised once. The verdict's merge loss is what that second rounding costs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export import layers
from lora_export.errors import Different, InputRefused, Undecided, count
from lora_export.graph.content_match import MAX_QUANTISATION_ERROR
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.onnx_file.reading import GraphFile, open_graph
from lora_export.graph.quantised_weights import MATMUL_NBITS, Steps
from lora_export.graph.site import Site
from lora_export.layers.module_tensors import dtype_name, named_tensors, tensor_registry
from lora_export.models.model import Model
from lora_export.models.stored_parameter import StoredParameter, state_of
from lora_export.options.spelling import named
from lora_export.plan import Layout, Plan, Step
from lora_export.verification import parity
from lora_export.verification.parity import DECIDES, Wide
from lora_export.verification.references.expected_weight import (
    ExpectedWeight,
    StoredForm,
    WrongNumbers,
    sum_in_fp64,
)
from lora_export.verification.references.quantisation_error import (
    NearestNumbers,
    QuantisationError,
    norm,
    quantisation_error_of,
)
from lora_export.verification.references.requantised_graph import sites_by_integers
from lora_export.weights.checkpoint import open_checkpoint

QUANTISED_OPERATORS = frozenset({MATMUL_NBITS, "DequantizeLinear"})
INT8_ACCURACY_LEVEL = 4  # MatMulNBits' accuracy_level from which it multiplies in int8; docs/ContribOperators.md
FUSED_BLOCK_SIZE = 32  # onnxruntime's session.qdq_matmulnbits_block_size
MERGED_FRACTION = 0.5  # a weight that contains more of an adapter's change was merged before it was quantised
MERGED_DEVIATIONS = 5.0  # so was one whose fraction is this many standard errors above zero
MISROUNDED_FRACTION = 0.05  # of the entries: more of them, and the weight is not one sum that was quantised once


@dataclass(frozen=True, eq=False)
class DequantisedWeight:
    """One weight as a graph computes with it."""

    kind: str  # such as `4 bits in blocks of 32`
    values: NDArray[np.float32]  # in the layout of the model's parameter
    distance: float  # ‖values − W‖ / ‖W‖; relative to W + ΔW where adapters were merged into the weight
    activation_block: int  # inputs that are rounded to int8 with one scale; 0 where they are not rounded
    rounding: Callable[[Wide], NearestNumbers] = field(repr=False)  # of a weight in this layout
    merge: QuantisedMerge | None = None  # where adapters were merged into the weight and the sum was quantised
    error: QuantisationError | None = None  # relative to what was quantised; of the origin's weight where it is known
    wrong: WrongNumbers | None = None  # of floats in the place of the origin's quantised weight; None: it is quantised

    def nearest(self, weight: Wide) -> Wide:
        """A weight in this layout, at the nearest numbers that the scales allow."""
        return self.rounding(weight).nearest


@dataclass(frozen=True, eq=False)
class QuantisedMerge:
    """The sum that a quantised weight should be, and how much of the adapters' change the weight contains."""

    base: NDArray[np.float32]  # the weight without adapters, in the layout of the model's parameter
    fraction: float  # <values − base, ΔW> / ‖ΔW‖²
    standard_error: float  # of `fraction`, from what rounding left beside the change
    distance: float  # ‖values − V‖ / ‖V‖, V = base + ΔW
    error: QuantisationError  # of the weight relative to V

    @property
    def is_likely(self) -> bool:
        """Whether the weight contains too much of the adapters' change for chance."""
        return self.fraction > MERGED_FRACTION or self.fraction > MERGED_DEVIATIONS * self.standard_error

    @property
    def is_one_sum(self) -> bool:
        """Whether the weight is `base` + ΔW, quantised once, but for a few entries."""
        return self.error.misrounded <= MISROUNDED_FRACTION * self.base.size


# --- read from the graph ------------------------------------------------------------------------


def find(
    file: GraphFile,
    model: Model,
    changes: Plan | None = None,
    origin: Path | None = None,
    executed: Callable[[], Collection[tuple[str, str]]] = frozenset,
    *,
    skip: Collection[str] = (),
) -> dict[str, DequantisedWeight]:
    """The quantised weights of a graph by the model's names; an empty dict for a graph of floats.

    `changes` are what adapters do to the model. `origin` is the quantised graph that they were merged into.
    `executed` returns the (node, operator) pairs that onnxruntime runs; it is called only where they matter. Weights in
    `skip` are left out.
    Reads the quantised weights, and what identifies them. Raises Different where a weight is no rounding of the
    model's. Raises Undecided where a weight seems to contain an adapter already and its base is unknown. Raises
    InputRefused where `origin` has no quantised weights of the model.
    """
    before: dict[str, DequantisedWeight] = {}
    origin_sites: dict[str, Site] = {}
    if origin is not None:
        origin_sites = _quantised_sites(open_graph(origin).model, model)
        before = _dequantised(origin_sites, model, ())
        _refuse_unrelated(before, str(origin))
        if not before:
            raise InputRefused(
                f"{origin} has no quantised weights of the model, so {file.path} was not made from it. Give the "
                "quantised graph that the adapters were merged into"
            )
    graph = file.model
    may_fuse = any(
        node.op_type in QUANTISED_OPERATORS - {MATMUL_NBITS}
        for node in ir.traversal.RecursiveGraphIterator(graph.graph)
    )
    found = {name: site for name, site in _quantised_sites(graph, model, origin_sites).items() if name not in skip}
    floats = {name: site for name, site in found.items() if site.quantised is None}
    found = {name: site for name, site in found.items() if site.quantised is not None}
    weights = _dequantised(found, model, executed() if may_fuse else ())
    weights |= _promoted(floats, before, model, changes)
    weights = _with_merges(weights, before, model, changes, origin)
    _refuse_unrelated(weights, "the graph")
    return weights


def _quantised_sites(graph: ir.Model, model: Model, origin_sites: Mapping[str, Site] | None = None) -> dict[str, Site]:
    """The sites of the graph's quantised weights, by the model's names.

    `origin_sites` are those of the graph that this one was made from. Both have the same initializers. A merged
    weight has lost the content by which it could be matched. Raises Undecided where a quantised weight's name is
    unknown.
    """
    is_quantised = any(node.op_type in QUANTISED_OPERATORS for node in ir.traversal.RecursiveGraphIterator(graph.graph))
    if not is_quantised and not origin_sites:
        return {}
    sites = find_sites(graph)
    if model.is_huggingface and not origin_sites and not _names_are_the_models(sites, model):
        with contextlib.suppress(InputRefused):  # content contradicts a name: the adapters may be in it
            sites = find_sites(graph, open_checkpoint(Path(model.source)))
    found = {name: site for name, readers in sites.by_name.items() for site in readers if site.quantised is not None}
    if origin_sites:
        by_integers = sites_by_integers(sites)
        if not by_integers:
            return {}
        found = {
            name: replace(own, name=name, block=site.block)
            for name, site in origin_sites.items()
            if (own := by_integers.get(str(site.value.name)) or next(iter(sites.by_name.get(name, ())), None))
            is not None
        }
    known = {site.value for site in found.values()}
    unnamed = [site for site in sites.unnamed if site.quantised is not None and site.value not in known]
    if unnamed:
        raise Undecided(
            f"the names of {count(len(unnamed), 'quantised weight')} are unknown "
            f"({', '.join(site.location for site in unnamed[:5])}). {DECIDES}: the graph that adapters were merged "
            f"into ({named('base', 'BASE.onnx')} beside {named('model')}), whose weights are matched with the "
            "model's by their content"
        )
    return found


def _names_are_the_models(sites: Sites, model: Model) -> bool:
    """Whether every quantised weight has the name of a tensor of the model. A checkpoint may have older names."""
    tensors = {spec.name for spec in layers.specs(model.module)}
    found = (name for name, readers in sites.by_name.items() if any(site.quantised is not None for site in readers))
    return tensors.issuperset(found) and all(site.quantised is None for site in sites.unnamed)


def _dequantised(
    sites: Mapping[str, Site], model: Model, executed: Collection[tuple[str, str]]
) -> dict[str, DequantisedWeight]:
    parameters = {spec.name: spec for spec in layers.specs(model.module)}
    tensors = state_of(model.module)
    found = {}
    for name, site in sites.items():
        if name not in parameters:
            continue
        assert site.quantised is not None
        original = tensors[name].detach().float().numpy()
        is_transposed = parameters[name].layout is Layout.IN_OUT
        values = site.matrix.T if is_transposed else site.matrix
        weight = DequantisedWeight(
            site.quantised.kind,
            np.ascontiguousarray(values, np.float32),
            norm(values - original) / (norm(original) or 1.0),
            _activation_block(site, executed),
            functools.partial(_rounding, site, is_transposed, dtype_name(tensors[name].dtype)),
        )
        found[name] = replace(weight, error=quantisation_error_of(weight.values, original, weight.rounding(original)))
    return found


def _promoted(
    sites: Mapping[str, Site], before: Mapping[str, DequantisedWeight], model: Model, changes: Plan | None
) -> dict[str, DequantisedWeight]:
    """The floats that are in the place of quantised weights of the origin: each should be W + s·BA, rounded once."""
    specs = {spec.name: spec for spec in layers.specs(model.module)}
    found = {}
    for name in sites.keys() & specs.keys() & before.keys():
        stored = np.ascontiguousarray(
            sites[name].matrix.T if specs[name].layout is Layout.IN_OUT else sites[name].matrix
        )
        step = None if changes is None else changes.by_weight.get(name)
        expected = ExpectedWeight(
            replace(specs[name], dtype=str(stored.dtype)),
            functools.partial(np.asarray, before[name].values),
            () if step is None else (step,),
        )
        wrong = expected.wrong_in(stored, (StoredForm.BASE if step is None else StoredForm.SUM,))
        distance = norm(stored - before[name].values) / (norm(before[name].values) or 1.0)
        rounding = functools.partial(_rounded_floats, stored.dtype)
        values = stored.astype(np.float32)
        found[name] = DequantisedWeight(str(stored.dtype), values, distance, 0, rounding, wrong=wrong)
    return found


def _rounded_floats(dtype: np.dtype[Any], values: Wide) -> NearestNumbers:
    nearest, size = values.astype(dtype).astype(np.float64), np.abs(values)
    eps = parity.EPS[str(dtype)]
    return NearestNumbers(nearest, Steps(size * eps, size, 1), eps, False)


def _rounding(site: Site, is_transposed: bool, dtype: str, values: Wide) -> NearestNumbers:
    assert site.quantised is not None
    matrix = values.T if is_transposed else values
    nearest, (own, largest, levels) = site.nearest(matrix), site.steps(matrix)
    if is_transposed:
        nearest, own, largest = nearest.T, own.T, largest.T
    eps = max(parity.EPS[site.quantised.scale_dtype], parity.EPS[dtype])
    return NearestNumbers(
        np.ascontiguousarray(nearest), Steps(own, largest, levels), eps, site.quantised.has_float_zeros
    )


def _activation_block(site: Site, executed: Collection[tuple[str, str]]) -> int:
    """How many inputs of the layer are rounded to int8 with one scale; 0 where they are not rounded."""
    assert site.quantised is not None
    node = site.quantised.node
    if node.op_type == MATMUL_NBITS:
        rounds = node.attributes.get_int("accuracy_level", 0) >= INT8_ACCURACY_LEVEL
        return node.attributes.get_int("block_size", 0) if rounds else 0
    # onnxruntime fuses much of what is dequantised with its product, at this level unless a session sets another, and
    # in blocks of its own where the scales have none. The fused node has the product's name.
    is_fused = (site.node.name, MATMUL_NBITS) in executed
    return (node.attributes.get_int("block_size", 0) or FUSED_BLOCK_SIZE) if is_fused else 0


def _refuse_unrelated(weights: Mapping[str, DequantisedWeight], owner: str) -> None:
    unrelated = [
        f"{name} ({weight.distance:.0%} away)"
        for name, weight in weights.items()
        if weight.distance > MAX_QUANTISATION_ERROR
    ]
    if unrelated:
        raise Different(f"quantised weights of {owner} are no rounding of the model's: {', '.join(unrelated[:10])}")


# --- given to the model -------------------------------------------------------------------------


def with_dequantised_weights(model: Model, weights: Mapping[str, DequantisedWeight]) -> Model:
    """A copy of the model that has these weights; without their adapters where adapters were merged into them."""
    if not weights:
        return model
    module = copy.deepcopy(model.module)
    tensors = state_of(module)  # shares the module's memory
    loaded: dict[int, nn.Parameter] = {}  # in place of parameters that are read from a file
    for name, weight in weights.items():
        values = torch.from_numpy(weight.values if weight.merge is None else weight.merge.base)
        if isinstance(tensors[name], StoredParameter):
            loaded[id(tensors[name])] = nn.Parameter(values.to(tensors[name].dtype), requires_grad=False)
        else:
            tensors[name].copy_(values)
    for _, owner, attribute, tensor in list(named_tensors(module)):
        if id(tensor) in loaded:
            tensor_registry(owner, attribute)[attribute] = loaded[id(tensor)]
    return replace(model, module=module)


# --- reported -----------------------------------------------------------------------------------


def notes_on(weights: Mapping[str, DequantisedWeight]) -> list[str]:
    """What a verdict notes about the quantised weights."""
    if not weights:
        return []
    kinds = sorted({weight.kind for weight in weights.values()})
    name, farthest = max(weights.items(), key=lambda item: item[1].distance)
    notes = [
        f"quantised weights: {len(weights)} ({', '.join(kinds)}). Every reference computed with the graph's own "
        f"weights. They are up to {farthest.distance:.1%} from the model's weights"
        f"{' and adapters' if farthest.merge else ''} ({name})"
    ]
    if any(weight.activation_block for weight in weights.values()):
        notes.append("onnxruntime multiplies these in int8 (accuracy_level 4): PyTorch's own error includes int8's")
    merges = {name: weight.merge for name, weight in weights.items() if weight.merge is not None}
    if merges:
        name, least = min(merges.items(), key=lambda item: item[1].fraction)
        mean = sum(merge.fraction for merge in merges.values()) / len(merges)
        notes.append(
            f"adapters were merged into {count(len(merges), 'quantised weight')}: each should be the nearest to W + s·"
            f"BA that its scales allow. They contain {mean:.0%} of the change on average, the least in {name} "
            f"({least.fraction:.2f} ± {least.standard_error:.2g})"
        )
    return notes


def merge_faults(weights: Mapping[str, DequantisedWeight]) -> list[str]:
    """What is wrong with weights whose correct values are known. Outputs may hide it: their inputs are rounded."""
    floats = [
        f"{name}: {weight.wrong.numbers:,} of {weight.values.size:,} numbers are not W + s·BA of the origin's "
        f"dequantised weight W, rounded to {weight.kind}, the first in row {weight.wrong.first}"
        for name, weight in weights.items()
        if weight.wrong is not None and weight.wrong.numbers
    ]
    return floats + [
        f"{name}: {weight.merge.error} are not the nearest to W + s·BA that "
        f"their scales allow ({weight.merge.fraction:.3f} ± {weight.merge.standard_error:.2g} of the change is in it)"
        for name, weight in weights.items()
        if weight.merge is not None and weight.wrong is None and weight.merge.error.misrounded
    ]


# --- merged into --------------------------------------------------------------------------------


def _with_merges(
    weights: Mapping[str, DequantisedWeight],
    before: Mapping[str, DequantisedWeight],
    model: Model,
    changes: Plan | None,
    origin: Path | None,
) -> dict[str, DequantisedWeight]:
    """The weights; those that contain the adapters already have their `merge`."""
    changed = {step.weight for step in changes.steps} if changes else set()
    unchanged = sorted((weights.keys() & before.keys()) - changed)
    differing = [name for name in unchanged if not np.array_equal(weights[name].values, before[name].values)]
    if differing:
        raise Different(
            f"quantised weights that no adapter changes are not those of {origin}: {', '.join(differing[:10])}"
        )
    if not weights or changes is None:
        return dict(weights)
    merges = dict(_merges(weights, before, model, changes))
    if origin is None:
        merges = {name: merge for name, merge in merges.items() if merge.is_likely}
        _refuse_unknown_bases(merges)
    elif all(np.array_equal(weight.values, before[name].values) for name, weight in weights.items() if name in before):
        merges = {}  # the adapters are beside the very weights of the origin
    merged = dict(weights)
    for name, merge in merges.items():
        # `merge_faults` reports wrong integers of the sum.
        error = before[name].error if name in before else replace(merge.error, misrounded=0)
        merged[name] = replace(weights[name], merge=merge, distance=merge.distance, error=error)
    return merged


def _merges(
    weights: Mapping[str, DequantisedWeight], before: Mapping[str, DequantisedWeight], model: Model, changes: Plan
) -> Iterator[tuple[str, QuantisedMerge]]:
    """What the adapters would make of each quantised weight, and how near the weight is to that."""
    tensors = state_of(model.module)
    for step in changes.steps:
        if step.weight in weights and (step.terms or step.has_own_values):
            known = before.get(step.weight)
            base = tensors[step.weight].detach().float().numpy() if known is None else known.values
            yield step.weight, _merge(weights[step.weight], base, step)


def _merge(weight: DequantisedWeight, base: NDArray[np.float32], step: Step) -> QuantisedMerge:
    total = sum_in_fp64(step, base)
    change = total - base
    moved = weight.values.astype(np.float64) - base
    energy = float((change**2).sum()) or 1.0
    fraction = float((moved * change).sum()) / energy
    standard_error = float(np.sqrt(np.mean((moved - fraction * change) ** 2) / energy))
    distance = norm(weight.values - total) / (norm(total) or 1.0)
    return QuantisedMerge(
        base, fraction, standard_error, distance, quantisation_error_of(weight.values, total, weight.rounding(total))
    )


def _refuse_unknown_bases(merges: Mapping[str, QuantisedMerge]) -> None:
    unknown = {name: merge for name, merge in merges.items() if not merge.is_one_sum}
    if unknown:
        found = [
            f"{name}: {merge.fraction:.2f} ± {merge.standard_error:.2g} of the adapter's change is in it, and "
            f"{merge.error.misrounded / merge.base.size:.0%} of its integers are not the nearest to W + s·BA"
            for name, merge in list(unknown.items())[:3]
        ]
        raise Undecided(
            f"{len(unknown)} quantised weights already contain an adapter, and the weights before it are unknown: "
            f"they are not the model's ({'; '.join(found)}). {DECIDES}: the quantised graph that the adapter was "
            f"merged into ({named('base', 'BASE.onnx')} beside {named('model')}), where "
            f"`merge {named('requantize', True)}` made this one. Weights that a search quantised after the merge "
            "(GPTQ, AWQ) cannot be decided here: verify the merge before it, or keep the adapter beside the quantised "
            f"weights (onnx {named('lora', 'nodes')})"
        )
