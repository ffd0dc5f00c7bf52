"""Which quantised weights of a base stay so in a merge, and which become floats: decided before anything is written.

Each weight that a plan changes is quantised again in memory and measured, of a large one a sample of its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType

from threadpoolctl import threadpool_limits

from lora_export.errors import InputRefused
from lora_export.options.spelling import named
from lora_export.plan import Plan, Step
from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.calibrated_rounding import LayerInputs
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.kept_weights import kept_tensor, measured_results
from lora_export.weights.merge_report import QuantisedLayer, StepResult
from lora_export.weights.quantised import QUANTIZATION_FILES, needs_no_statement, with_floats, without_shared_parts
from lora_export.weights.quantised.new_grid import NewGrid
from lora_export.weights.quantised_layers import OWN_VALUES, refuse_promotion, with_bound_layers, worst_result
from lora_export.weights.rescaled import rescaled


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
    changed = [name for name in base.quantised if name in plan.by_weight or name in plan.by_part]
    replaced = [name for name in changed if name in plan.by_weight and _has_own_values(plan.by_weight[name])]
    added_to = [name for name in changed if name not in replaced]
    new = {name: grid for name in added_to if (grid := _rescaled(plan, base, name))} if rescale else {}
    measured = functools.partial(_measured, plan, base, calibration=calibration)
    worst, why = _judged(measured(added_to, progress_of, new), min_retention)
    grids = {name: grid for name in why if (grid := base.quantised[name].finer())} if _can_state_finer(base) else {}
    too_small = _judged(
        _measured(plan, base, list(grids), lambda _: lambda _: None, grids, calibration), min_retention
    )[1]
    finer = with_bound_layers({name: why.pop(name) for name in grids if name not in too_small}, base.quantised)
    why |= dict.fromkeys(replaced, OWN_VALUES)
    promoted = with_bound_layers(why, base.quantised)
    grids |= {name: grid for name in finer if name not in grids and (grid := base.quantised[name].finer())}
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


def _can_state_finer(base: Checkpoint) -> bool:
    return with_floats(base.config, [], [], ["a layer"]) != base.config


def _judged(
    measured: Mapping[str, Sequence[StepResult]], min_retention: float
) -> tuple[dict[str, StepResult], dict[str, str]]:
    """The worst result of each weight, and why those that are lost cannot stay as they were measured."""
    decided = {name: worst_result(results, min_retention) for name, results in measured.items()}
    worst = {name: result for name, (result, _) in decided.items()}
    return worst, {name: why for name, (_, why) in decided.items() if why}


def _has_own_values(step: Step) -> bool:
    return step.replace is not None or step.token_rows is not None


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
