"""What becomes of quantised weights that adapters change, layer by layer: kept in their scheme, or promoted.

A layer is kept where its scheme can hold the change: enough of the change arrives, and the rounding adds less noise
than the change itself is large. Both have to be measured. Stochastic rounding has a retention of 1 and a noise of
several times the change. Any other layer is promoted: stored in a wider type, where the format can state that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from lora_export.errors import InputRefused, listed
from lora_export.names.loaded_names import LoadedNames
from lora_export.options.spelling import command, named
from lora_export.plan import Plan, TensorSpec
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.merge_report import QuantisedLayer, StepResult

MOST_NOISE = 1.0  # ‖(W'-W) - ΔW‖ / ‖ΔW‖
OWN_VALUES = "the adapter has values of its own"  # why a layer is promoted whose weight is replaced

# Layers that servers fuse (`packed_modules_mapping` of vLLM's models): all parts of one need one type.
FUSED = (
    *("q_proj k_proj v_proj", "gate_proj up_proj", "w1 w3", "wq wk wv", "query key value", "to_q to_k to_v"),
    *("q_a_proj kv_a_proj_with_mqa", "in_proj_qkv in_proj_z", "in_proj_b in_proj_a"),
)
FUSED_WITH = {part: parts for parts in FUSED for part in parts.split()}
OF_EXPERTS = re.compile(r"(.*\bexperts)\.")  # all experts of a layer are one


def why_promoted(result: StepResult, min_retention: float) -> str:
    """Why a scheme cannot hold the change of a layer; empty where it can. `result` was measured in that scheme."""
    if not result.arrived >= min_retention:  # NaN too
        return f"{max(result.arrived, 0):.1%} of its change would be left"
    if result.error > MOST_NOISE:
        return f"the noise would be {result.error:.2g} times its change"
    return ""


def worst_result(results: Sequence[StepResult], min_retention: float) -> tuple[StepResult, str]:
    """Of the parts of a layer the one that decides about it, and why the layer is promoted; empty where it is kept."""
    reasons = [(result, why) for result in results if (why := why_promoted(result, min_retention))]
    return min(reasons or [(result, "") for result in results], key=lambda one: one[0].arrived)


def with_bound_layers(promoted: Mapping[str, str], weights: Collection[str]) -> dict[str, str]:
    """The promoted weights and why, with all other quantised `weights` that are bound to one of them.

    Servers fuse some layers. And loaders exclude a layer by a part of its name, or by the end of it.
    """
    first: dict[str, str] = {}
    for name in promoted:
        first.setdefault(_fused_module(name), name)
    fused = {name: first[_fused_module(name)] for name in weights if _fused_module(name) in first}
    every = {**{name: f"fused with {other}" for name, other in fused.items() if name != other}, **promoted}
    others = "\n".join(name for name in weights if name not in every)
    for name in [name for name in every if _module(name) in others]:
        containing = [other for other in weights if other not in every and _module(name) in other]
        every |= dict.fromkeys(containing, f"its name contains that of {name}")
    return every if len(every) == len(promoted) else with_bound_layers(every, weights)


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _fused_module(weight: str) -> str:
    """A name for the module that servers make of a layer and those that are fused with it."""
    module = _module(weight)
    if experts := OF_EXPERTS.match(module):
        return experts[1]
    parent, _, own = module.rpartition(".")
    return f"{parent}.{FUSED_WITH.get(own, own)}"


def refuse_promotion(layers: Sequence[QuantisedLayer], of: int, because: str, ways_out: str) -> None:
    """Raise InputRefused where layers, some `of` the quantised ones, would have to be promoted and cannot be."""
    lost = [layer for layer in layers if not layer.is_kept]
    if lost:
        raise InputRefused(
            f"{len(lost)} of {of} quantised weights cannot hold their change, and {because}:",
            listed([f"{layer.weight} ({layer.scheme}): {layer.why}" for layer in lost]),
            f"{ways_out}. Nothing was written.",
        )


def ways_out_beside_kept() -> str:
    """What helps where the floats of promoted layers lose a change, too."""
    return (
        f"Make the base a float model with more digits ({named('dequantize', True)}, {named('dtype', 'float32')}), or "
        f"keep the adapter beside the weights ({command('onnx', lora='nodes')})"
    )


def float_modules(base: Checkpoint, plan: Plan) -> tuple[list[str], list[str], list[str]]:
    """The modules that the config of a merge has to name: as floats, as floats before it, and as those of 8 bits now.

    The first are those that become floats, and the linear layers that an adapter adds: a loader would quantise them.
    Where the merge renames all tensors, those that were floats before are among them. A module has the names of its
    tensors in the files, and in the loaded model where transformers renames them.
    """
    loaded = {} if base.rules is None else LoadedNames(base.rules, [spec.name for spec in base.specs]).by_stored

    def modules(names: Iterable[str]) -> list[str]:
        every = ((plan.output_name(name), *(tensor.name for tensor in loaded.get(name, ()))) for name in names)
        return sorted({name.rpartition(".")[0] for names in every for name in names})

    def are_matrices(specs: Iterable[TensorSpec]) -> list[str]:
        return [spec.name for spec in specs if len(spec.shape) == 2 and spec.name.endswith(".weight")]

    quantised = {*base.quantised, *(tensor.name for tensor in base.kept.values())}
    before = modules(name for name in are_matrices(base.specs) if name not in quantised)
    added = are_matrices(step.spec for step in plan.steps if step.added)
    new = {*modules(base.quantised), *(name.rpartition(".")[0] for name in added)}
    finer = [name for name, grid in base.grids.items() if not grid.is_rescaled]
    return sorted(new.union(before if plan.name_prefix else ())), before, modules(finer)
