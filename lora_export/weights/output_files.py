"""The files of a merge's output: weights, and others that are copied from the base or changed as its weights are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.formats.task_adapters import FIELDS
from lora_export.plan import Plan, Step, are_same_change
from lora_export.provenance import adapter_records
from lora_export.storage import input_files, json_files, safetensors_file
from lora_export.storage.hashes import file_hash
from lora_export.storage.safetensors_file import TensorFile
from lora_export.storage.store_output import begun_at
from lora_export.storage.store_path import copy_in_store
from lora_export.version import __version__
from lora_export.weights.checkpoint import CONFIG, Checkpoint
from lora_export.weights.merge_report import OutputResult, StepResult
from lora_export.weights.quantised import QUANTIZATION_FILES, file_with_floats, with_floats, without_quantisation
from lora_export.weights.quantised_layers import float_modules
from lora_export.weights.task_head import config_with_heads
from lora_export.weights.tensor_blocks import OutputTensor
from lora_export.weights.tied_tensors import TIED, untied_config, word_tables


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
        if (stage / name).exists() and any((floats := float_modules(base, plan))[::2]):
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
        floats = float_modules(base, plan)
        config = with_floats(config, *floats) if any(floats[::2]) else config
    elif base.quantised:
        config = without_quantisation(config)
    if base.own_adapters:
        config = {key: value for key, value in config.items() if key not in FIELDS}
    if dtype and config:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    return config


def _are_untied(plan: Plan, base: Checkpoint) -> bool:
    """Whether the base stores several word tables, its config ties them, and they change differently."""
    tables = changed_word_tables(plan, base)
    if len(tables) < 2 or not base.config.get(TIED) or not tables.keys() <= {spec.name for spec in base.specs}:
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


# --- Files of weights that an earlier run has made already, or that a store can copy ---


@dataclass(frozen=True)
class WrittenFile:
    """One file of the output."""

    file: TensorFile
    results: tuple[StepResult, ...]
    source_hash: str
    target_hash: str

    @property
    def facts(self) -> dict[str, Any]:
        """All but the file, as JSON has it."""
        return {"results": [asdict(one) for one in self.results], "hashes": [self.source_hash, self.target_hash]}


def recipe_of(plan: Plan, settings: Mapping[str, Any], hashing: str) -> str:
    """What determines the bytes of an output besides the base, as a text; empty for adapters without a hash."""
    if not all(adapter.sha256 for adapter in plan.adapters):
        return ""
    terms = [[step.weight, [[term.module, term.scale] for term in step.terms]] for step in plan.steps]
    return json.dumps([__version__, hashing, dict(settings), adapter_records(plan.adapters, plan.strengths), terms])


def made_before(path: Path, source: TensorFile, header: bytes, recipe: str) -> tuple[str, WrittenFile | None]:
    """The hash of all that determines a file of the output; and the file, where a stopped run has made it in a store.

    The hash is empty where no later run could use the file.
    """
    begun, state = begun_at(path.parent), source.path.stat()
    if begun is None or not recipe:
        return "", None
    identity = [recipe, str(source.path), state.st_ino, state.st_size, state.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(identity).encode() + header).hexdigest()
    facts = begun.whole(path.name, digest)
    if facts is None:
        return digest, None
    results = (one | {"outputs": one["outputs"] and OutputResult(**one["outputs"])} for one in facts["results"])
    found = tuple(StepResult(**one) for one in results)
    return digest, WrittenFile(safetensors_file.open_file(path), found, *facts["hashes"])


def record_made(path: Path, digest: str, written: WrittenFile) -> WrittenFile:
    """Record in a store that a file is whole."""
    begun = begun_at(path.parent)
    if begun is not None and digest:
        begun.add(path.name, digest, written.facts)
    return written


def copied_whole(
    path: Path, source: TensorFile, tensors: Sequence[OutputTensor], metadata: Mapping[str, str], hashing: str
) -> WrittenFile | None:
    """A file of which nothing changes, copied by the store that has it; None where that cannot be.

    It is read for its hash, and not uploaded.
    """
    own = list(source.entries.values())
    is_same = [tensor.source for tensor in tensors] == own and all(
        tensor.is_copy and tensor.name == tensor.source.name and tensor.output_shape == tensor.source.shape
        for tensor in tensors
    )
    if not is_same or dict(metadata) != dict(source.metadata) or not copy_in_store(source.path, path):
        return None
    digest = file_hash(source.path, hashing)
    return WrittenFile(safetensors_file.open_file(path), (), digest, digest)
