"""What a quantised graph holds in place of its model's weights: everybody else computes with it too.

A graph of few bits lies as far from its model as its rounding, which is no fault of an adapter beside it. So that the
two are told apart, the referee, the model as deployed and the controls are all given the very weights that
the graph holds, read from the file by our own reading of its format: the gates stay as narrow as for floats, and
how far the weights lie from the model's is said beside the verdict. What is no rounding of the model's is `different`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export import layers, plan
from lora_export.checkpoint import open_checkpoint
from lora_export.errors import Different, Undecided
from lora_export.graph.content import NEAR
from lora_export.graph.files import open_graph
from lora_export.graph.quantised import NBITS
from lora_export.graph.sites import Site, find
from lora_export.lora import Adapter
from lora_export.model import Model
from lora_export.plan import Layout

HOLDERS = frozenset({NBITS, "DequantizeLinear"})
ROUNDS_ACTIVATIONS = 4  # MatMulNBits' accuracy_level from which it multiplies in int8; docs/ContribOperators.md
HALF = 0.5  # of an adapter's change that a weight holds which was merged before it was quantised


@dataclass(frozen=True, eq=False)
class StandIn:
    """One weight as a graph computes with it."""

    kind: str  # such as `4 bits in blocks of 32`
    weight: NDArray[np.float32]  # as the model's parameter lies
    distance: float  # ‖weight − W‖ / ‖W‖
    block: int  # of the layer's input that is rounded to int8 with one scale; 0: it is not


def stand_ins(path: Path, model: Model, adapters: Sequence[Adapter] = ()) -> dict[str, StandIn]:
    """The quantised weights of a graph by the model's names; none where it is a graph of floats.

    Reads those weights, and what names them. Raises Different where one of them is no rounding of the model's
    weight, and Undecided where it seems to hold an adapter already.
    """
    graph = open_graph(path).model
    if not any(node.op_type in HOLDERS for node in ir.traversal.RecursiveGraphIterator(graph.graph)):
        return {}
    sites = find(graph, open_checkpoint(Path(model.source)) if model.is_huggingface else None)
    parameters = {spec.name: spec for spec in layers.specs(model.module)}
    tensors = model.module.state_dict()
    found = {}
    for name, there in sites.by_name.items():
        site = next((site for site in there if site.quantised is not None), None)
        if site is None or name not in parameters:
            continue
        own = tensors[name].detach().float().numpy()
        held = site.matrix.T if parameters[name].layout is Layout.IN_OUT else site.matrix
        found[name] = StandIn(
            _kind(site),
            np.ascontiguousarray(held, np.float32),
            _norm(held - own) / (_norm(own) or 1.0),
            _block(site),
        )
    _refuse_strangers(found)
    _refuse_merged(found, model, adapters)
    return found


def standing_in(model: Model, held: Mapping[str, StandIn]) -> Model:
    """The model with these weights in place of its own."""
    if not held:
        return model
    module = copy.deepcopy(model.module)
    tensors = module.state_dict()  # shares the module's memory
    with torch.no_grad():
        for name, there in held.items():
            tensors[name].copy_(torch.from_numpy(there.weight))
    return dataclasses.replace(model, module=module)


def round_activations(module: nn.Module, held: Mapping[str, StandIn]) -> None:
    """Make the module's layers err as those do that multiply these weights by their input rounded to int8.

    Symmetric, one scale for each block of the input: what onnxruntime does for `accuracy_level` 4. What stands
    beside a weight, an adapter, is given the input as it is.
    """
    specs = {spec.name: spec for spec in layers.specs(module)}
    for name, there in held.items():
        if there.block:
            weight = torch.from_numpy(there.weight.T if specs[name].layout is Layout.IN_OUT else there.weight)
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.register_forward_hook(functools.partial(_with_rounding_error, weight, there.block))


def _with_rounding_error(weight: torch.Tensor, size: int, _: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
    (values,) = inputs
    error = _rounded(values, size) - values
    return output + nn.functional.linear(error, weight.to(error.device))


def told(held: Mapping[str, StandIn]) -> list[str]:
    """What a verdict says of it."""
    if not held:
        return []
    kinds = sorted({there.kind for there in held.values()})
    name, worst = max(held.items(), key=lambda item: item[1].distance)
    lines = [
        f"{len(held)} weights are quantised ({', '.join(kinds)}): everybody computed with what the graph holds, which "
        f"lies up to {worst.distance:.1%} from the model's weights ({name})"
    ]
    if any(there.block for there in held.values()):
        lines.append("onnxruntime multiplies in int8 there (accuracy_level 4): PyTorch's own error is that of int8 too")
    return lines


def _kind(site: Site) -> str:
    assert site.quantised is not None
    return site.quantised.kind


def _block(site: Site) -> int:
    assert site.quantised is not None
    attributes = site.quantised.node.attributes
    # onnxruntime fuses what is dequantised in blocks with its product, and at this level unless a session says another.
    default = 0 if site.quantised.node.op_type == NBITS else ROUNDS_ACTIVATIONS
    rounds = attributes.get_int("accuracy_level", default) >= ROUNDS_ACTIVATIONS
    return attributes.get_int("block_size", 0) if rounds else 0


def _norm(array: NDArray[Any]) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _rounded(values: torch.Tensor, size: int) -> torch.Tensor:
    features = values.shape[-1]
    blocks = nn.functional.pad(values, (0, -features % size)).unflatten(-1, (-1, size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    levels = torch.where(scale > 0, blocks / scale, blocks).round()
    rounded: torch.Tensor = (levels * scale).flatten(-2)[..., :features]
    return rounded


def _refuse_strangers(held: Mapping[str, StandIn]) -> None:
    strange = [f"{name} ({there.distance:.0%} away)" for name, there in held.items() if there.distance > NEAR]
    if strange:
        raise Different(f"quantised weights of the graph are no rounding of the model's: {', '.join(strange[:10])}")


def _refuse_merged(held: Mapping[str, StandIn], model: Model, adapters: Sequence[Adapter]) -> None:
    merged = list(_merged(held, model, adapters)) if held and adapters else []
    if merged:
        raise Undecided(
            f"the quantised weights hold the adapter already ({', '.join(merged[:10])}): how much of their distance "
            "from the model is rounding cannot be told. Judge the merge before it is quantised, or keep the adapter "
            "beside the quantised weights (onnx --lora nodes)"
        )


def _merged(held: Mapping[str, StandIn], model: Model, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Weights in which more of the adapters' change is found than not."""
    tensors = model.module.state_dict()
    for step in plan.make(adapters, layers.specs(model.module)).low_rank:
        if step.weight not in held:
            continue
        own, there = tensors[step.weight].detach().float().numpy(), held[step.weight].weight
        if step.spec.layout.is_turned:
            own, there = own.T, there.T
        _, change = step.carried_out(own)
        energy = float((change.astype(np.float64) ** 2).sum())
        if float(((there - own).astype(np.float64) * change).sum()) > HALF * energy:
            yield step.weight
