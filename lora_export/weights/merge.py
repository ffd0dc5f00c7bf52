"""Executor 1: a plan over a checkpoint. It costs little more than a file copy.

Every file of the base is carried over in blocks (see `block_copy.transfer`), those of a weight that changes in whole
rows, so that memory does not grow with the model. `apply_step` sums and rounds.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export import provenance
from lora_export.errors import InputRefused, listed
from lora_export.plan import FLOATS, Plan, Tied
from lora_export.plan.match_names import apart_or_both
from lora_export.storage import block_copy, safetensors_file
from lora_export.storage.block_copy import Block, Copy
from lora_export.storage.hashes import FAST
from lora_export.storage.manifest import write_manifest
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.weights import tensor_blocks
from lora_export.weights.apply_step import Backend
from lora_export.weights.checkpoint import Checkpoint, tensor_aliases
from lora_export.weights.lost_names import lost_names
from lora_export.weights.merge_report import (
    MIN_RETENTION,
    MergeReport,
    OnBytesWritten,
    Statistics,
    StatisticsByWeight,
    refuse_below_rounding,
)
from lora_export.weights.one_pass import FileCopy, Merging, alone
from lora_export.weights.output_files import changed_word_tables, output_config, write_other_files
from lora_export.weights.quantised.comfyui_files import without_layers
from lora_export.weights.tensor_blocks import OutputTensor, Patch
from lora_export.weights.tied_tensors import TIED, can_untie, is_tied
from lora_export.weights.written_file import (
    WrittenFile,
    copied_whole,
    digest_of,
    hash_of_source,
    made_before,
    recipe_of,
    record_made,
)

if TYPE_CHECKING:
    from lora_export.weights.calibrated_rounding import LayerInputs
    from lora_export.weights.quantised.stored_parts import QuantisedTensor

# Classes of transformers whose output embeddings predict words
WORD_HEAD = re.compile(r"LMHead|For(CausalLM|MaskedLM|ConditionalGeneration|PreTraining)")


def merge_checkpoint(
    plan: Plan,
    base: Checkpoint,
    stage: Path,
    *,
    file_name: str = "model.safetensors",
    dtype: str | None = None,
    min_retention: float = MIN_RETENTION,
    hashing: str = FAST,
    progress: OnBytesWritten = lambda _: None,
    backend: Backend | None = None,
    more_settings: Mapping[str, Any] = MappingProxyType({}),
    calibration: Mapping[str, LayerInputs] = MappingProxyType({}),
) -> MergeReport:
    """Carry out a plan over a checkpoint, into the folder `stage` (see `atomic_output`).

    A folder becomes a folder with the same shards, config and tokenizer, and a manifest. A bare file becomes one file
    called `file_name`, with its provenance in the header. `dtype` converts every float tensor. `hashing` names the
    hash that records base and output (see `hashes.ALGORITHMS`). `backend` computes the changes, by default NumPy.
    `more_settings` are recorded beside those of this function. `calibration` has the inputs of layers, by the names of
    their weights in the output: these are rounded with feedback, and the record names them. Peak memory is a few blocks
    and the matrices of two layers' inputs, whatever the size of the model.

    Raises InputRefused when an adapter is already merged in the base, the merge would break tied embeddings, a value
    is not finite, the base changes meanwhile, or a weight keeps less than `min_retention` of its change. Files that
    are already in `stage` then stay there: the caller discards them.
    """
    merge = CheckpointMerge(plan, base, dtype, min_retention, hashing, backend or Backend(), more_settings, calibration)
    return alone(merge.into(stage, file_name=file_name, progress=progress))


@dataclass(frozen=True, eq=False)
class CheckpointMerge:
    """A plan over a checkpoint, and how its output is written. The fields are the arguments of `merge_checkpoint`."""

    plan: Plan
    base: Checkpoint
    dtype: str | None = None
    min_retention: float = MIN_RETENTION
    hashing: str = FAST
    backend: Backend = field(default_factory=Backend)
    more_settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, LayerInputs] = field(default_factory=dict)

    def into(
        self,
        stage: Path,
        *,
        file_name: str = "model.safetensors",
        progress: OnBytesWritten = lambda _: None,
        made: Mapping[str, WrittenFile] = MappingProxyType({}),
    ) -> Merging[MergeReport]:
        """Write the output, and yield each file that is written next (see `one_pass`). As `merge_checkpoint`.

        `made` has files of the base whose output is in `stage` already.
        """
        begun, plan, base = time.perf_counter(), self.plan, self.base
        refuse_before_merge(plan, base)
        written = {}
        for name in base.shards:
            path = stage / (name if base.is_folder else file_name)
            written[name] = made.get(name) or (yield from self._write_shard(path, name, progress))
        results = tuple(result for shard in written.values() for result in shard.results)
        refuse_below_rounding(results, self.min_retention, _way_out(base))
        base.refuse_changed_files("merged")
        if base.is_folder:
            named_layers = [one.weight for one in results if one.outputs is not None and one.outputs.is_calibrated]
            own = {"calibrated": sorted(named_layers)} if named_layers else {}
            origin = self._record({name: shard.source_hash for name, shard in written.items()}, own)
            for name in [name for name in written if not self._tensors[name]]:  # it had only scales of other files
                written.pop(name).file.path.unlink()
            write_other_files(plan, base, stage, {name: shard.file for name, shard in written.items()}, self.dtype)
            hashes = {name: {self.hashing: shard.target_hash} for name, shard in written.items()}
            write_manifest(stage, origin, hashes)
        return MergeReport(
            results=results,
            copied=sum(tensor.nbytes for own in self._tensors.values() for tensor in own if tensor.is_copy),
            bytes=sum(shard.file.size for shard in written.values()),
            replaced_weights=plan.replaced_weights,
            seconds=time.perf_counter() - begun,
            spellings={one.name: spelling for one, spelling in zip(plan.adapters, plan.spellings, strict=False)},
        )

    # --- One file: several workers together write what one process does ---

    def digest(self, name: str) -> str:
        """The hash of all that determines a file of a folder; see `digest_of`."""
        return digest_of(self.base.shards[name], self._layout(name)[0], self._recipe)

    def write_file(self, path: Path, name: str) -> WrittenFile:
        """Write a file of a folder. Raises InputRefused as `merge_checkpoint` does."""
        return alone(self._write_shard(path, name, lambda _: None))

    def _write_shard(self, path: Path, name: str, progress: OnBytesWritten) -> Merging[WrittenFile]:
        source, tensors, backend = self.base.shards[name], self._tensors[name], self.backend
        hashes = block_copy.RunningHashes(self.hashing)
        header, entries = self._layout(name, hashes.source.hexdigest())
        digest = digest_of(source, header, self._recipe)
        found = made_before(path, digest) or copied_whole(path, source, tensors, self._metadata(name), self.hashing)
        if found is not None:
            progress(found.file.size)
            return record_made(path, digest, found)
        with source.path.open("rb") as reader, path.open("xb") as writer:
            if not writer.seekable():  # the header goes first. Where it has the source's hash, the source is read twice
                if not self.base.is_folder:
                    header, _ = self._layout(name, hash_of_source(source.path, self.hashing))
                block_copy.write(writer.fileno(), memoryview(header), 0)
            block_copy.reserve(writer.fileno(), max([len(header), *(entry.stop for entry in entries)]))
            hashes.target.update(header)
            hashes.source.update(reader.read(source.data_start))
            blocks = _blocks(source, reader.fileno(), writer.fileno(), tensors, entries, backend)
            by_weight = StatisticsByWeight()

            def add(block: Block, found: list[Statistics] | None) -> None:
                by_weight.add(found)
                progress(block.target_stop - block.target_start)

            size, number = tensor_blocks.block_size(tensors), list(self.base.shards).index(name)
            is_apart = any(tensor.needs_whole for tensor in tensors)
            yield FileCopy(source, number, Copy(writer.fileno(), blocks, hashes), size, backend, add, is_apart)
            if writer.seekable():
                header, _ = self._layout(name, hashes.source.hexdigest())  # as long as the first: all hashes are
                block_copy.write(writer.fileno(), memoryview(header), 0)
        progress(len(header))
        written, own_hashes = safetensors_file.open_file(path), (hashes.source.hexdigest(), hashes.target.hexdigest())
        return record_made(path, digest, WrittenFile(written, by_weight.results, *own_hashes))

    def _layout(self, name: str, source_hash: str = "") -> tuple[bytes, list[Entry]]:
        """The header of a file of the output, and where its tensors will be."""
        described = [(tensor.name, tensor.dtype, tensor.output_shape) for tensor in self._tensors[name]]
        metadata, beside = self._metadata(name, source_hash), self.base.shards[name].data_start
        return safetensors_file.layout(described, metadata, beside=beside)

    def _metadata(self, name: str, source_hash: str = "") -> Mapping[str, str]:
        """The metadata of a file's header; of a bare file with its record, which names the hash of the source."""
        own = {} if self.base.is_folder else {provenance.KEY: json.dumps(self._record({name: source_hash}))}
        return {"format": "pt", **_header_metadata(self.plan, self.base, self.base.shards[name]), **own}

    def _record(self, hashes: Mapping[str, str], more: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """The record of provenance, from the hashes of the base's files."""
        by_file = {name: {self.hashing: value} for name, value in hashes.items()}
        plan, settings = self.plan, {**self._settings, **more}
        path, history = self.base.path, self.base.history
        return provenance.record(plan.adapters, plan.strengths, by_file, history, settings, base_path=path)

    @functools.cached_property
    def _tensors(self) -> Mapping[str, list[OutputTensor]]:
        return _output_tensors(self.plan, self.base, self.dtype, self.calibration)

    @functools.cached_property
    def _recipe(self) -> str:
        return recipe_of(self.plan, self._settings, self.hashing)

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        """The settings of the merge, for the record of provenance."""
        settings = {"dtype": self.dtype or "keep", "min_retention": self.min_retention} | _stated_layouts(self.plan)
        settings |= {**self.backend.settings, **self.more_settings}
        settings |= {} if self.plan.tied == Tied.ERROR else {"tied": str(self.plan.tied)}
        return settings | _stated_quantisation(self.plan, self.base)


def _stated_layouts(plan: Plan) -> dict[str, Any]:
    """The layouts that the user stated, for the record of provenance."""
    stated = {step.weight: step.spec.layout.value for step in plan.steps if step.spec.layout_source == "option"}
    return {"layout": stated} if stated else {}


def _stated_quantisation(plan: Plan, base: Checkpoint) -> dict[str, Any]:
    """What happened to quantised weights, for the record of provenance."""
    if base.kept:
        schemes = sorted({tensor.scheme for tensor in base.kept.values()})
        others: dict[str, list[str]] = {}
        for name, grid in base.grids.items():
            others.setdefault("rescaled" if grid.is_rescaled else "finer", []).append(plan.output_name(name))
        others = {kind: sorted(names) for kind, names in others.items()}
        return {"quantised": {"kept": schemes, "promoted": sorted(map(plan.output_name, base.quantised)), **others}}
    return {"dequantised": sorted({tensor.scheme for tensor in base.quantised.values()})} if base.quantised else {}


def _way_out(base: Checkpoint) -> Callable[[], str] | None:
    """What the message on a lost change suggests, where it is not the usual."""
    if not base.kept:
        return None
    from lora_export.weights.quantised_layers import ways_out_beside_kept

    return ways_out_beside_kept


def _header_metadata(plan: Plan, base: Checkpoint, shard: TensorFile) -> dict[str, str]:
    """The metadata of a file's header, with the aliases that are still ones, under the names of the output."""
    aliases = tensor_aliases(base.shards.values())
    added = {step.weight for step in plan.steps if step.added} | plan.untied.keys()
    floats = [name.removesuffix(".weight") for name in base.quantised] if base.kept else None
    own = without_layers(shard.metadata, floats) if base.quantised or base.kept else shard.metadata
    return {
        plan.output_name(key) if key in aliases else key: plan.output_name(value) if key in aliases else value
        for key, value in own.items()
        if key not in added
    }


def output_size(plan: Plan, base: Checkpoint, dtype: str | None = None) -> int:
    """How many bytes of tensors a merge writes."""
    return sum(tensor.nbytes for tensors in _output_tensors(plan, base, dtype).values() for tensor in tensors)


# --- What is refused ---


def refuse_before_merge(plan: Plan, base: Checkpoint) -> None:
    """Raise InputRefused for a merge that is refused whatever the weights are. Reads no weights."""
    provenance.refuse_second_merge(plan.adapters, base.path, base.history)
    if plan.tied == Tied.ERROR:
        refuse_broken_tie(plan, base)
    if lost := lost_names(base, _output_names(plan, base), output_config(plan, base, None), added_names(plan)):
        lines = [f"{name}: {why}" for name, why in lost.items()]
        raise InputRefused(
            "transformers would ignore weights of the result, or draw some at random:",
            listed(lines),
        )


def refuse_broken_tie(plan: Plan, base: Checkpoint) -> None:
    """Raise InputRefused where the input embeddings change, and the output embeddings are the same stored tensor.

    If they were trained apart, they would be two tensors. A file of a tied model has one, and the output embeddings
    would change with the input embeddings. Rows of tokens are allowed: where a model is tied, PEFT trains them for
    both.
    """
    architecture = str((base.config.get("architectures") or [""])[0])
    tables = changed_word_tables(plan, base)
    may_be_tied = base.config.get(TIED, True) or is_tied(base)
    if len(tables) != 1 or not may_be_tied or not WORD_HEAD.search(architecture):
        return
    ((name, step),) = tables.items()
    if step is not None and not step.replaces_only_rows and not plan.changes_tied(name):
        raise InputRefused(
            f"{name} is the output embeddings too (tie_word_embeddings), which the adapter does not change. "
            f"{apart_or_both(can_untie=can_untie(base.rules), takes_more=base.takes_more)}"
        )


def added_names(plan: Plan) -> list[str]:
    """The tensors of the output that the base does not store."""
    return [*map(plan.output_name, plan.untied), *(plan.output_name(step) for step in plan.steps if step.added)]


def _output_names(plan: Plan, base: Checkpoint) -> list[str]:
    """The names of all tensors that a merge writes."""
    return [*(plan.output_name(spec.name) for spec in base.specs), *added_names(plan)]


# --- Writing ---


def _output_tensors(
    plan: Plan, base: Checkpoint, dtype: str | None, calibration: Mapping[str, LayerInputs] = MappingProxyType({})
) -> dict[str, list[OutputTensor]]:
    """Every tensor of the output, by file, in the order of the base's bytes; added tensors are the last."""

    def output_dtype(own: np.dtype[Any]) -> np.dtype[Any]:
        return np.dtype(dtype) if dtype and str(own) in FLOATS else own

    kept = _kept_outputs(plan, base)

    def output_of(entry: Entry) -> OutputTensor:
        own_dtype, quantised = output_dtype(entry.dtype), base.quantised.get(entry.name)
        return kept.get(entry.name) or _output_tensor(entry, plan, own_dtype, quantised)

    tensors = {name: [output_of(entry) for entry in base.entries(name).values()] for name in base.shards}
    for name, source in plan.untied.items():
        own = next(shard for shard in base.shards if source in base.entries(shard))
        entry = replace(base.entries(own)[source], name=name)
        copied = _output_tensor(entry, plan, output_dtype(entry.dtype), base.quantised.get(source))
        tensors[own].append(replace(copied, repeated=True))
    for step in plan.steps:
        if step.added and step.replace is not None:
            no_bytes = Entry(step.weight, step.replace.dtype, step.spec.shape, 0, 0)
            # Loaders of quantised models leave a float layer in its own dtype, and its inputs have the model's.
            stored = next((tensor.dtype for tensor in base.kept.values()), output_dtype(no_bytes.dtype))
            added = OutputTensor(no_bytes, step, plan.output_name(step), stored)
            tensors[list(tensors)[-1]].append(added)
    return {name: [one.with_inputs(one.weight, calibration) for one in own] for name, own in tensors.items()}


def _kept_outputs(plan: Plan, base: Checkpoint) -> Mapping[str, OutputTensor]:
    """The tensors of weights that keep their scheme, as the output has them, by name."""
    if not base.kept:
        return {}
    from lora_export.weights.kept_weights import kept_outputs  # few bases are quantised

    entries = (entry for name in base.shards for entry in base.entries(name).values())
    return kept_outputs(entries, base.kept, base.grids, plan)


def _output_tensor(
    entry: Entry, plan: Plan, dtype: np.dtype[Any], quantised: QuantisedTensor | None = None
) -> OutputTensor:
    """A tensor of the base on its way into the output, with the step on it, or with the steps on its parts."""
    name, parts = plan.output_name(entry.name), plan.by_part.get(entry.name, ())
    step, shape = plan.by_weight.get(entry.name), entry.shape
    if quantised is not None and step is None:
        entry = replace(entry, shape=quantised.row_shape)
    if not parts:
        return OutputTensor(entry, step, name, dtype, quantised=quantised, shape=shape)
    regions = [step.spec.region for step in parts if step.spec.region is not None]
    patches = (Patch(step, region.rows, region.columns) for step, region in zip(parts, regions, strict=True))
    if quantised is not None and quantised.row_shape[0] % regions[0].shape[0]:
        raise InputRefused(f"{entry.name}: a quantised weight of which an adapter changes such a part is not supported")
    cut = replace(entry, shape=regions[0].shape)  # parts that are cut in different shapes are refused
    return OutputTensor(cut, None, name, dtype, tuple(patches), quantised, shape)


def _blocks(
    source: TensorFile,
    read_fd: int,
    write_fd: int,
    tensors: Sequence[OutputTensor],
    entries: Sequence[Entry],
    backend: Backend,
) -> Iterator[Block]:
    """All data of the source, in its order, then the untied and the added tensors."""
    position = source.data_start
    for run in tensor_blocks.runs(zip(tensors, entries, strict=True), _are_neighbours):
        (first, entry), (last, _) = run[0], run[-1]
        if last.source.stop > position:  # the parts of quantised weights are read for the hash of the file
            yield from tensor_blocks.skipped_blocks(position, entry.start, first.source.start - position)
            position = last.source.stop
        if first.is_copy:
            count = last.source.stop - first.source.start
            blocks = tensor_blocks.copied_blocks(read_fd, write_fd, first.source.start, entry.start, count)
        else:
            blocks = first.blocks_into(source.path, read_fd, entry, backend)
        yield from (replace(block, repeated=True) for block in blocks) if first.repeated else blocks
    yield from tensor_blocks.skipped_blocks(position, 0, source.size - position)


def _are_neighbours(one: tuple[OutputTensor, Entry], other: tuple[OutputTensor, Entry]) -> bool:
    """Whether two tensors are copied, and follow each other in both files without a gap."""
    (before, _), (after, _) = one, other
    is_next = not after.repeated and after.source.start == before.source.stop
    return before.is_copy and after.is_copy and is_next
