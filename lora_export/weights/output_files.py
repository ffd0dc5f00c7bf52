"""The files of an output beside its weights: copied from the base, or changed as its weights are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.formats.task_adapters import FIELDS
from lora_export.plan import Plan, Step, are_same_change
from lora_export.storage import input_files, json_files
from lora_export.storage.safetensors_file import TensorFile
from lora_export.weights.checkpoint import CONFIG, Checkpoint
from lora_export.weights.quantised import QUANTIZATION_FILES, file_with_floats, with_floats, without_quantisation
from lora_export.weights.task_head import config_with_heads
from lora_export.weights.tied_tensors import TIED, can_untie, untied_config, word_tables


def write_other_files(
    plan: Plan, base: Checkpoint, stage: Path, written: Mapping[str, TensorFile], dtype: str | None
) -> None:
    """Copy the files that are not weights; write the config and the index of the output."""
    for relative in base.other_files():
        (stage / relative).parent.mkdir(parents=True, exist_ok=True)
        input_files.copy_file(base.path / relative, stage / relative)
    config = output_config(plan, base, dtype)
    if config != base.config:
        json_files.write_json(stage / CONFIG, config)
    for name in QUANTIZATION_FILES if base.kept else ():
        if (stage / name).exists() and any((floats := _float_modules(base, plan))[::2]):
            stated = json_files.read_json(stage / name)
            json_files.write_json(stage / name, file_with_floats(name, stated, *floats))
    if base.index:
        weight_map = {entry: name for name, file in written.items() for entry in file.entries}
        size = sum(entry.nbytes for file in written.values() for entry in file.entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        json_files.write_json(stage / base.index, index, sort_keys=True)


def output_config(plan: Plan, base: Checkpoint, dtype: str | None) -> dict[str, Any]:
    """The config of the output: of its heads, tables, dtype and quantisation."""
    config = config_with_heads(base.config, plan.adapters)
    replaced = [
        step for step in changed_word_tables(plan, base).values() if step is not None and step.replace is not None
    ]
    are_equal = len(replaced) > 1 and all(_are_equal(replaced[0], other) for other in replaced[1:])
    is_added_apart = any(step.added for step in replaced) and not are_equal  # a loader would drop the added table
    if config and (plan.untied or is_added_apart or _are_untied(plan, base)):
        config = untied_config(config)
    if base.kept:
        floats = _float_modules(base, plan)
        config = with_floats(config, *floats) if any(floats[::2]) else config
    elif base.quantised:
        config = without_quantisation(config)
    if base.own_adapters:
        config = {key: value for key, value in config.items() if key not in FIELDS}
    if dtype and config:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    return config


def _float_modules(base: Checkpoint, plan: Plan) -> tuple[list[str], list[str], list[str]]:
    from lora_export.weights.quantised_layers import float_modules  # few bases are quantised

    finer = [name for name, grid in base.grids.items() if not grid.is_rescaled]
    return float_modules(base, plan, base.quantised, finer)


def _are_untied(plan: Plan, base: Checkpoint) -> bool:
    """Whether the base stores several word tables, its config ties them, and they change differently.

    Not of classes that are other models without this tie: transformers leaves tables of other values apart there, too.
    """
    tables, is_stated = changed_word_tables(plan, base), base.config.get(TIED) and can_untie(base.rules)
    if len(tables) < 2 or not is_stated or not tables.keys() <= {spec.name for spec in base.specs}:
        return False
    first, *others = tables.values()
    return any(one is not first and (one is None or first is None or not are_same_change(first, one)) for one in others)


def _are_equal(one: Step, other: Step) -> bool:
    """Whether two steps replace their tensors by the same values."""
    if one.terms or other.terms or one.token_rows or other.token_rows or one.replace is None or other.replace is None:
        return False
    return np.array_equal(one.replace, other.replace)


def changed_word_tables(plan: Plan, base: Checkpoint) -> dict[str, Step | None]:
    """The output's tables of words (input and output embeddings), and the step on each of them."""
    specs = {spec.name: spec for spec in (*base.specs, *(step.spec for step in plan.steps))}
    return {name: plan.by_weight.get(name) for name in word_tables(base, specs.values())}
