"""What becomes of quantised weights that adapters change, layer by layer: kept in their scheme, or promoted.

A layer is kept where its scheme can hold the change: enough of the change arrives, and the rounding adds less noise
than the change itself is large. Both have to be measured. Stochastic rounding has a retention of 1 and a noise of
several times the change. Any other layer is promoted: stored in a wider type, where the format can state that.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType

from threadpoolctl import threadpool_limits

from lora_export.errors import InputRefused, listed
from lora_export.names.loaded_names import LoadedNames
from lora_export.options.spelling import command, named
from lora_export.plan import Plan, TensorSpec
from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.calibrated_rounding import LayerInputs
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.kept_weights import kept_tensor, measured_results, rescaled
from lora_export.weights.merge_report import QuantisedLayer, StepResult
from lora_export.weights.quantised import QUANTIZATION_FILES, needs_no_statement, with_floats, without_shared_parts
from lora_export.weights.quantised.new_grid import NewGrid

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
            f"{ways_out}",
        )


def ways_out_beside_kept() -> str:
    """What helps where the floats of promoted layers lose a change, too."""
    return (
        f"Make the base a float model with more digits ({named('dequantize', True)}, {named('dtype', 'float32')}), or "
        f"keep the adapter beside the weights ({command('onnx', lora='nodes')})"
    )


def float_modules(
    base: Checkpoint, plan: Plan, promoted: Iterable[str], finer: Iterable[str]
) -> tuple[list[str], list[str], list[str]]:
    """The modules that the config of a merge has to name: as floats, as floats before it, and as those of 8 bits now.

    The first are those that become floats, and the linear layers that an adapter adds: a loader would quantise them.
    Where the merge renames all tensors, those that were floats before are among them. A module has the names of its
    tensors in the files, and in the loaded model where transformers renames them. `promoted` are the quantised weights
    that become floats, `finer` those of 8 bits.
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
    new = {*modules(promoted), *(name.rpartition(".")[0] for name in added)}
    return sorted(new.union(before if plan.name_prefix else ())), before, modules(finer)


# --- The decision: each weight that changes is quantised again in memory and measured, of a large one some rows ---


def keep_quantised(
    plan: Plan,
    base: Checkpoint,
    min_retention: float,
    *,
    rescale: bool = False,
    progress_of: Callable[[int], Callable[[int], None]] = lambda _: lambda _: None,
    calibration: Mapping[str, LayerInputs] = MappingProxyType({}),
) -> tuple[Checkpoint, tuple[QuantisedLayer, ...]]:
    """The base with `kept` weights, and the others as floats; and what becomes of each layer that changes, and why.

    With `rescale`, weights that change get new scales where their scheme has a rule for them.

    Reads the rows of the base that are measured. `progress_of` receives the bytes of all weights to measure, and
    returns what receives those of each. Raises InputRefused for changes that cannot be quantised again.
    """
    if tied := [name for name in plan.untied.values() if name in base.quantised]:
        raise InputRefused(
            f"{tied[0]} is quantised, and the output would have it under two names. Make the base a float model "
            f"({named('dequantize', True)})"
        )
    changed = [name for name in base.quantised if plan.steps_on(name)]
    replaced = [name for name in changed if any(step.has_own_values for step in plan.steps_on(name))]
    added_to = [name for name in changed if name not in replaced]
    new = {name: grid for name in added_to if (grid := _rescaled(plan, base, name))} if rescale else {}
    measured = functools.partial(_measured, plan, base, calibration=calibration)
    worst, why = _judged(measured(added_to, progress_of, new), min_retention)
    can_state_finer = with_floats(base.config, [], [], ["a layer"]) != base.config
    grids = {name: grid for name in why if can_state_finer and (grid := base.quantised[name].finer())}
    too_small = _judged(
        _measured(plan, base, list(grids), lambda _: lambda _: None, grids, calibration), min_retention
    )[1]
    finer = with_bound_layers({name: why.pop(name) for name in grids if name not in too_small}, base.quantised)
    grids |= {name: grid for name in finer if name not in grids and (grid := base.quantised[name].finer())}
    schemes = {grid.scheme for grid in grids.values()}  # of 8 bits: a layer that is fused with these may have them
    too_fine = [name for name in finer if name not in grids and base.quantised[name].scheme not in schemes]
    why |= {name: f"{finer[name]}, and its scales are too small for 8 bits" for name in too_fine}
    why |= dict.fromkeys(replaced, OWN_VALUES)
    promoted = with_bound_layers(why, base.quantised)
    grids = new | {name: grid for name, grid in grids.items() if name in finer}
    grids = {name: grid for name, grid in grids.items() if name not in promoted}
    layers = tuple(
        QuantisedLayer(
            weight=plan.output_name(name),
            scheme=tensor.scheme,
            stored=str(tensor.dtype) if name in promoted else grids[name].stored_as if name in grids else tensor.scheme,
            why=promoted.get(name, finer.get(name, "")),
            retention=worst[name].retention if name in worst else None,
            noise=worst[name].noise if name in worst else None,
            outputs=worst[name].outputs if name in worst else None,
        )
        for name, tensor in base.quantised.items()
        if name in changed or name in promoted or name in grids
    )
    kept = {tensor.packed: tensor for name, tensor in base.quantised.items() if name not in promoted}
    floats = {name: base.quantised[name] for name in promoted}
    output = replace(base, quantised=without_shared_parts(floats) if kept else floats, kept=kept, grids=grids)
    if promoted and kept and not _can_state_floats(output):
        because = "the config has no place that states which layers are floats"
        remedy = (
            f"Make the base a float model ({named('dequantize', True)}), keep the adapter beside it, or accept the "
        )
        refuse_promotion(layers, len(layers), because, f"{remedy}loss ({named('min_retention', 0)})")
    return output, layers


def _rescaled(plan: Plan, base: Checkpoint, name: str) -> NewGrid | None:
    tensor = base.quantised[name]
    file = next(shard for shard in base.shards.values() if tensor.packed in shard.entries)
    kept = kept_tensor(file.entries[tensor.packed], tensor, plan)
    return None if kept is None else rescaled(kept, tensor.scheme, file.path, tensor.scaling)


def _can_state_floats(base: Checkpoint) -> bool:
    files = [name for name in QUANTIZATION_FILES if (base.path / name).is_file()]
    is_stated = bool(files) or with_floats(base.config, ["a layer"], []) != base.config
    return is_stated or all(map(needs_no_statement, base.kept.values()))


def _judged(
    measured: Mapping[str, Sequence[StepResult]], min_retention: float
) -> tuple[dict[str, StepResult], dict[str, str]]:
    """The worst result of each weight, and why those that are lost cannot stay as they were measured."""
    decided = {name: worst_result(results, min_retention) for name, results in measured.items()}
    worst = {name: result for name, (result, _) in decided.items()}
    return worst, {name: why for name, (_, why) in decided.items() if why}


def _measured(
    plan: Plan,
    base: Checkpoint,
    names: Sequence[str],
    progress_of: Callable[[int], Callable[[int], None]],
    grids: Mapping[str, NewGrid] = MappingProxyType({}),
    calibration: Mapping[str, LayerInputs] = MappingProxyType({}),
) -> dict[str, list[StepResult]]:
    """What is left of the change of each weight, and of each part of it, when it is quantised again."""
    stored = {name: shard for shard in base.shards.values() for name in shard.entries}

    def entry(name: str) -> Entry:
        packed = base.quantised[name].packed
        return stored[packed].entries[packed]

    def measure(name: str) -> list[StepResult]:
        tensor = base.quantised[name]
        file = stored[tensor.packed]
        kept = kept_tensor(entry(name), tensor, plan, grids.get(name))
        assert kept is not None
        with file.path.open("rb") as reader:
            return measured_results(kept.with_inputs(kept.weight, calibration), file.path, reader.fileno())

    found, progress = {}, progress_of(sum(entry(name).nbytes for name in names))
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(block_copy.default_threads()) as pool:
        for name, results in zip(names, pool.map(measure, names), strict=True):
            found[name] = results
            progress(entry(name).nbytes)
    return found
