"""What a quantised graph holds in place of its model's weights: everybody else computes with it too.

A graph of few bits lies as far from its model as its rounding, which is no fault of an adapter beside it. So that the
two are told apart, the reference, the model as deployed and the controls are all given the very weights that
the graph holds, read from the file by our own reading of its format: the gates stay as narrow as for floats, and
how far the weights lie from the model's is said beside the verdict. What is no rounding of the model's is `different`.

Where adapters were merged into the quantised weights, the reference does it too, in fp64: W + s·BA, each entry at the
nearest number that the graph's own scales allow. W is what the graph held before (`origin`), or the model's, where
the sum was quantised once. What that second rounding costs of the adapter is the verdict's merge loss.
"""

from __future__ import annotations

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
from lora_export.errors import Different, InputRefused, Undecided
from lora_export.graph.match_by_content import NEAR
from lora_export.graph.onnx_file import open_graph
from lora_export.graph.quantised.layouts import NBITS
from lora_export.graph.sites import Site, find, place
from lora_export.models.model import Model
from lora_export.plan import Layout, Plan
from lora_export.verification.parity import DECIDES
from lora_export.weights.checkpoint import open_checkpoint

Wide = NDArray[np.float64]

HOLDERS = frozenset({NBITS, "DequantizeLinear"})
ROUNDS_ACTIVATIONS = 4  # MatMulNBits' accuracy_level from which it multiplies in int8; docs/ContribOperators.md
OWN_BLOCK = 32  # onnxruntime's session.qdq_matmulnbits_block_size
HALF = 0.5  # of an adapter's change that a weight holds which was merged before it was quantised
SURE = 5.0  # standard deviations from which a smaller share of it is no chance
FEW = 0.05  # share of the entries that a fault may have changed in what is one sum, quantised once
NEAR_TIE = 2.0**-16  # of the largest entry: what a sum in fp32 may cost beside the middle of two integers


@dataclass(frozen=True, eq=False)
class StandIn:
    """One weight as a graph computes with it."""

    kind: str  # such as `4 bits in blocks of 32`
    weight: NDArray[np.float32]  # as the model's parameter lies
    distance: float  # ‖weight − W‖ / ‖W‖; W + ΔW of what it was, where adapters were merged into it
    block: int  # of the layer's input that is rounded to int8 with one scale; 0: it is not
    nearest: Callable[[Wide], Wide] = field(repr=False)  # of what its scales allow, to a weight as it lies here
    merged: Merged | None = None  # where adapters were merged into it and the sum was quantised


@dataclass(frozen=True, eq=False)
class Merged:
    """Of what a quantised weight is the sum, and how much of the adapters' change is found in it."""

    before: NDArray[np.float32]  # the weight without adapters, as the model's parameter lies
    found: float  # <weight − before, ΔW> / ‖ΔW‖²
    doubt: float  # of `found`: one standard deviation, by what rounding left beside it
    distance: float  # ‖weight − V‖ / ‖V‖, V = before + ΔW
    strange: int  # entries that are not the nearest which the scales allow to before + ΔW


def stand_ins(
    path: Path,
    model: Model,
    changes: Plan | None = None,
    origin: Path | None = None,
    executed: Callable[[], Collection[tuple[str, str]]] = frozenset,
) -> dict[str, StandIn]:
    """The quantised weights of a graph by the model's names; none where it is a graph of floats.

    `changes` are what adapters do to the model, `origin` is the quantised graph that they were merged into;
    `executed` tells what onnxruntime makes of the graph, (node, operator), and is asked where that matters.
    Reads those weights, and what names them. Raises Different where one of them is no rounding of the model's weight,
    and Undecided where it seems to hold an adapter already and nobody knows of what it is the sum.
    """
    before: dict[str, StandIn] = {}
    named: dict[str, Site] = {}
    if origin is not None:
        named = _quantised_sites(open_graph(origin).model, model)
        before = _weights_at(named, model, ())
        _refuse_strangers(before, str(origin))
        if not before:
            raise InputRefused(f"{origin} has no quantised weights of the model: it is not what {path} was made of")
    graph = open_graph(path).model
    has_pairs = any(node.op_type in HOLDERS - {NBITS} for node in ir.traversal.RecursiveGraphIterator(graph.graph))
    found = _weights_at(_quantised_sites(graph, model, named), model, executed() if has_pairs else ())
    found = _with_sums(found, before, model, changes, origin)
    _refuse_strangers(found, "the graph")
    return found


def _quantised_sites(graph: ir.Model, model: Model, named: Mapping[str, Site] | None = None) -> dict[str, Site]:
    """Where the graph holds the model's weights in few bits, by the model's names.

    `named` are those of the graph that this one was made of, which has the same initializers: what was merged into
    has the content no more by which it could be known. Raises Undecided where nobody knows a quantised weight's name.
    """
    if not any(node.op_type in HOLDERS for node in ir.traversal.RecursiveGraphIterator(graph.graph)):
        return {}
    base = open_checkpoint(Path(model.source)) if model.is_huggingface and not named else None
    try:
        sites = find(graph, base)
    except InputRefused:  # content contradicts a name: the adapters may be in it
        sites = find(graph)
    found = {name: site for name, there in sites.by_name.items() for site in there if site.quantised is not None}
    if named:
        alike = {site.value.name: site for site in (*found.values(), *sites.unnamed) if site.quantised is not None}
        found = {
            name: replace(alike[site.value.name], name=name, block=site.block)
            for name, site in named.items()
            if site.value.name in alike
        }
    known = {site.value for site in found.values()}
    lost = [site for site in sites.unnamed if site.quantised is not None and site.value not in known]
    if lost:
        raise Undecided(
            f"nobody knows what {len(lost)} quantised weights are called ({', '.join(map(place, lost[:5]))}). "
            f"{DECIDES}: the graph that adapters were merged into (--base BASE.onnx beside --model), whose weights the "
            "model's own tell by their content"
        )
    return found


def _weights_at(sites: Mapping[str, Site], model: Model, runs: Collection[tuple[str, str]]) -> dict[str, StandIn]:
    parameters = {spec.name: spec for spec in layers.specs(model.module)}
    tensors = model.module.state_dict()
    found = {}
    for name, site in sites.items():
        if name not in parameters:
            continue
        own = tensors[name].detach().float().numpy()
        is_turned = parameters[name].layout is Layout.IN_OUT
        held = site.matrix.T if is_turned else site.matrix
        found[name] = StandIn(
            _kind(site),
            np.ascontiguousarray(held, np.float32),
            _norm(held - own) / (_norm(own) or 1.0),
            _block(site, runs),
            functools.partial(_nearest, site, is_turned),
        )
    return found


def _nearest(site: Site, is_turned: bool, values: Wide) -> Wide:
    found = site.nearest(values.T if is_turned else values)
    return np.ascontiguousarray(found.T if is_turned else found)


def standing_in(model: Model, held: Mapping[str, StandIn]) -> Model:
    """The model with these weights in place of its own; with what they were where adapters were merged into them."""
    if not held:
        return model
    module = copy.deepcopy(model.module)
    tensors = module.state_dict()  # shares the module's memory
    with torch.no_grad():
        for name, there in held.items():
            tensors[name].copy_(torch.from_numpy(there.weight if there.merged is None else there.merged.before))
    return replace(model, module=module)


def round_activations(module: nn.Module, held: Mapping[str, StandIn]) -> None:
    """Make the module's layers err as those do that multiply these weights by their input rounded to int8.

    Symmetric, one scale for each block of the input: what onnxruntime does for `accuracy_level` 4. What stands
    beside a weight, an adapter, is given the input as it is. Raises Undecided for a weight of nn.MultiheadAttention,
    whose products nobody sees.
    """
    specs = {spec.name: spec for spec in layers.specs(module)}
    for name, there in held.items():
        if there.block:
            weight = torch.from_numpy(there.weight.T if specs[name].layout is Layout.IN_OUT else there.weight)
            path = name.rpartition(".")[0]
            owners = [module.get_submodule(at) for at in (path, path.rpartition(".")[0])]
            if any(isinstance(owner, nn.MultiheadAttention) for owner in owners):  # it reads its output's weight, too
                raise Undecided(
                    f"{name} is multiplied in int8, and what nn.MultiheadAttention multiplies is not to be seen: how "
                    f"far that may lie from fp64 is unknown. {DECIDES}: the same graph of an accuracy_level below 4"
                )
            owners[0].register_forward_hook(functools.partial(_with_rounding_error, weight, there.block))


def _with_rounding_error(weight: torch.Tensor, size: int, _: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
    (values,) = inputs
    error = _rounded(values, size) - values
    return output + nn.functional.linear(error, weight.to(error))


def told(held: Mapping[str, StandIn]) -> list[str]:
    """What a verdict says of it."""
    if not held:
        return []
    kinds = sorted({there.kind for there in held.values()})
    name, worst = max(held.items(), key=lambda item: item[1].distance)
    lines = [
        f"{len(held)} weights are quantised ({', '.join(kinds)}): everybody computed with what the graph holds, which "
        f"lies up to {worst.distance:.1%} from the model's weights{' and adapters' if worst.merged else ''} ({name})"
    ]
    if any(there.block for there in held.values()):
        lines.append("onnxruntime multiplies in int8 there (accuracy_level 4): PyTorch's own error is that of int8 too")
    sums = {name: there.merged for name, there in held.items() if there.merged is not None}
    if sums:
        name, least = min(sums.items(), key=lambda item: item[1].found)
        mean = sum(there.found for there in sums.values()) / len(sums)
        lines.append(
            f"adapters were merged into {len(sums)} quantised weights: each should be the nearest to W + s·BA that its "
            f"scales allow. Of the change {mean:.0%} is in them in the mean, least in {name} ({least.found:.2f} ± "
            f"{least.doubt:.2g})"
        )
    return lines


def faults(held: Mapping[str, StandIn]) -> list[str]:
    """What is wrong with weights of which it is known what they should be: a rounded input may hide it."""
    return [
        f"{name}: {there.merged.strange:,} of {there.weight.size:,} integers are not the nearest to W + s·BA that "
        f"their scales allow ({there.merged.found:.3f} ± {there.merged.doubt:.2g} of the change is in it)"
        for name, there in held.items()
        if there.merged is not None and there.merged.strange
    ]


def _kind(site: Site) -> str:
    assert site.quantised is not None
    return site.quantised.kind


def _block(site: Site, runs: Collection[tuple[str, str]]) -> int:
    """How much of a layer's input is rounded to int8 at once; 0: it is not."""
    assert site.quantised is not None
    node = site.quantised.node
    if node.op_type == NBITS:
        rounds = node.attributes.get_int("accuracy_level", 0) >= ROUNDS_ACTIVATIONS
        return node.attributes.get_int("block_size", 0) if rounds else 0
    # onnxruntime fuses much of what is dequantised with its product, at this level unless a session says another, and
    # in blocks of its own where the scales have none. The node that does both has the product's name.
    is_fused = (site.node.name, NBITS) in runs
    return (node.attributes.get_int("block_size", 0) or OWN_BLOCK) if is_fused else 0


def _norm(array: NDArray[Any]) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _rounded(values: torch.Tensor, size: int) -> torch.Tensor:
    features = values.shape[-1]
    blocks = nn.functional.pad(values, (0, -features % size)).unflatten(-1, (-1, size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    levels = torch.where(scale > 0, blocks / scale, blocks).round()
    rounded: torch.Tensor = (levels * scale).flatten(-2)[..., :features]
    return rounded


def _refuse_strangers(held: Mapping[str, StandIn], who: str) -> None:
    strange = [f"{name} ({there.distance:.0%} away)" for name, there in held.items() if there.distance > NEAR]
    if strange:
        raise Different(f"quantised weights of {who} are no rounding of the model's: {', '.join(strange[:10])}")


def _with_sums(
    held: Mapping[str, StandIn],
    before: Mapping[str, StandIn],
    model: Model,
    changes: Plan | None,
    origin: Path | None,
) -> dict[str, StandIn]:
    """The weights, and of what those are the sum that hold the adapters already."""
    touched = {step.weight for step in changes.steps} if changes else set()
    shared = sorted((held.keys() & before.keys()) - touched)
    strange = [name for name in shared if not np.array_equal(held[name].weight, before[name].weight)]
    if strange:
        raise Different(
            f"quantised weights that no adapter changes are not those of {origin}: {', '.join(strange[:10])}"
        )
    if not held or changes is None:
        return dict(held)
    sums = dict(_sums(held, before, model, changes))
    if origin is None:
        sums = {name: there for name, there in sums.items() if there.found > HALF or there.found > SURE * there.doubt}
        _refuse_unknown_sums(sums)
    elif all(np.array_equal(there.weight, before[name].weight) for name, there in held.items() if name in before):
        sums = {}  # the adapters are beside the very weights of the origin
    merged = {name: replace(held[name], merged=there, distance=there.distance) for name, there in sums.items()}
    return {**held, **merged}


def _sums(
    held: Mapping[str, StandIn], before: Mapping[str, StandIn], model: Model, changes: Plan
) -> Iterator[tuple[str, Merged]]:
    """What each quantised weight would be as a sum, and how far that is true."""
    tensors = model.module.state_dict()
    for step in changes.low_rank:
        if step.weight not in held:
            continue
        there = held[step.weight]
        own = before[step.weight].weight if step.weight in before else tensors[step.weight].detach().float().numpy()
        turn = np.transpose if step.spec.layout.is_turned else np.asarray
        total, change = (turn(part).astype(np.float64) for part in step.carried_out(turn(own)))
        kept = there.weight.astype(np.float64) - own
        energy = float((change**2).sum()) or 1.0
        found = float((kept * change).sum()) / energy
        doubt = float(np.sqrt(np.mean((kept - found * change) ** 2) / energy))
        tie = NEAR_TIE * float(np.abs(total).max(initial=0.0))
        strange = np.abs(there.weight - total) > np.abs(there.nearest(total) - total) + tie
        distance = _norm(there.weight - total) / (_norm(total) or 1.0)
        yield step.weight, Merged(own, found, doubt, distance, int(strange.sum()))


def _refuse_unknown_sums(sums: Mapping[str, Merged]) -> None:
    strange = {name: there for name, there in sums.items() if there.strange > FEW * there.before.size}
    if strange:
        told = [
            f"{name}: {there.found:.2f} ± {there.doubt:.2g} of the adapter's change is in it, and "
            f"{there.strange / there.before.size:.0%} of its integers are not the nearest to W + s·BA"
            for name, there in list(strange.items())[:3]
        ]
        raise Undecided(
            f"{len(strange)} quantised weights hold the adapter already, and the model's own weights do not say of "
            f"what they are the sum ({'; '.join(told)}). {DECIDES}: the quantised graph that the adapter was merged "
            "into (--base BASE.onnx beside --model), where `merge --requantize` made this one. Weights that a search "
            "quantised after the merge (GPTQ, AWQ) cannot be decided here: judge the merge before it, or keep the "
            "adapter beside the quantised weights (onnx --lora nodes)"
        )
