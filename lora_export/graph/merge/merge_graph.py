"""Merging a plan into a graph on disk, of any size.

The graph without its weights is changed in memory, as `fold_graph` does it. The bytes of the weights then pass from the
old files to the new ones in blocks (`copy_parts`), and those that change are changed on the way.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.graph.exporter_names import remove_exporter_notes
from lora_export.graph.find_sites import Sites
from lora_export.graph.merge.copy_parts import MergeRun, MovedTensor, copy_parts, graph_file_parts, write_data_file
from lora_export.graph.merge.fold import InitializerChange, change_in_memory, isolate_changes, with_readers_alike
from lora_export.graph.onnx_file.reading import GraphFile
from lora_export.graph.onnx_file.shared_weights import SharedTensor, share_weights
from lora_export.graph.onnx_file.writing import append_metadata
from lora_export.graph.quantised_weights import is_quantised
from lora_export.graph.refusals import graph_remedy, refuse_lost_biases, refuse_quantised, refuse_unsupported_steps
from lora_export.graph.values import initializers
from lora_export.plan import Plan
from lora_export.provenance import ROW_ADAPTERS_KEY
from lora_export.storage.block_copy import RunningHashes
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.merge_report import MergeReport, refuse_below_rounding
from lora_export.weights.tensor_blocks import OutputTensor

NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


def merge_graph(
    plan: Plan, graph: GraphFile, sites: Sites, stage: Path, run: MergeRun, settings: Mapping[str, Any] = NO_SETTINGS
) -> MergeReport:
    """Merge a plan into the graph of a file. Writes into the folder `stage` (see `atomic_output.stage_file`).

    Weights inside the graph's file stay inside. Weights in files beside it go into one file that is named by its
    content. Only the plan's weights change: other readers of a changed tensor keep the old one. The graph's properties
    stay, and get a record of this merge, with these settings; exporter notes are removed. Peak memory is the graph
    without its weights and a few blocks. `graph.model` must not be used afterwards.

    Raises InputRefused where an adapter is merged already, a value is not finite, a file changes during the merge, or
    a weight retains less than `run.min_retention` of its change.
    """
    begun = time.perf_counter()
    write_merged(plan, graph, sites, stage, run)
    requantised = {"requantize": True} if run.requantise else {}
    settings = {"lora": "merged", "min_retention": run.min_retention, **requantised, **run.backend.settings, **settings}
    record = provenance.record(plan.adapters, plan.strengths, run.hashes, graph.history, settings, base_path=graph.path)
    append_metadata(stage / run.file_name, {provenance.KEY: json.dumps(record)})
    for path in graph.changed():
        raise InputRefused(f"{path} changed while it was being merged")
    return merge_report(plan, graph, stage, run, time.perf_counter() - begun)


def merge_report(plan: Plan, graph: GraphFile, stage: Path, run: MergeRun, seconds: float) -> MergeReport:
    """What a merge did, once its files are in the folder `stage`."""
    return MergeReport(
        results=run.statistics.results,
        copied=run.copied,
        bytes=sum(path.stat().st_size for path in run.written(stage)),
        replaced_weights=plan.replaced_weights,
        seconds=seconds,
        layers=run.layers,
        base_bytes=graph.nbytes if run.layers else 0,
    )


def write_merged(plan: Plan, graph: GraphFile, sites: Sites, stage: Path, run: MergeRun) -> None:
    """Do the work of `merge_graph`, without its record and without its check for files that change."""
    refuse_before_graph_merge(plan, graph, sites, requantise=run.requantise)
    with threadpool_limits(1, user_api="blas"):
        changes = _change_or_defer(plan, graph.model, sites, run)
    remove_exporter_notes(graph.model)
    graph.model.metadata_props.pop(provenance.KEY, None)  # the new record includes its adapters
    share_weights(graph.model, run.shared, but=changes.values)
    tensors = list(_moved_tensors(graph.model, changes))
    own_file = Path(os.path.realpath(graph.path))
    with threadpool_limits(1, user_api="blas"):  # the transfer itself runs one thread per core
        beside = [tensor for tensor in tensors if tensor.source != own_file or run.takes_out(tensor)]
        if beside:
            write_data_file(stage, beside, run)
        parts = graph_file_parts(graph.model, [tensor for tensor in tensors if tensor not in beside])
        with (stage / run.file_name).open("xb") as target:
            run.sources[own_file] = copy_parts(own_file, target, parts, RunningHashes(run.hashing), run)
    run.copied = sum(tensor.old.nbytes for tensor in tensors if tensor.is_copy)
    refuse_below_rounding(run.statistics.results, run.min_retention, graph_remedy)


def refuse_before_graph_merge(plan: Plan, graph: GraphFile, sites: Sites, *, requantise: bool = False) -> None:
    """Raise InputRefused for a merge that cannot succeed. Reads no weight."""
    if graph.takes_adapters:
        reason = (
            "its rows choose among the adapters in it"
            if ROW_ADAPTERS_KEY in graph.model.metadata_props
            else "the files of its adapters contain fingerprints of its weights"
        )
        raise InputRefused(f"{graph.path} takes adapters: {reason}. Merge into the graph from which it was made")
    provenance.refuse_second_merge(plan.adapters, graph.path, graph.history)
    refuse_unsupported_steps(plan)
    refuse_lost_biases(plan, sites)
    for step in plan.steps:
        if not requantise:
            refuse_quantised(step, sites)
        for site in sites.by_name[step.spec.stored_name]:
            if site.quantised is not None:
                from lora_export.graph.quantised.scheme_of_weight import refuse_unknown_scheme  # few weights are

                refuse_unknown_scheme(site.quantised, step.weight)
                if step.needs_weight:
                    raise InputRefused(
                        f"{step.weight} is quantised, and the change by {step.terms[0].pair.kind} follows from the "
                        "weight: it is not quantised again after that. Merge into the float model, and quantise that"
                    )


@dataclass(frozen=True, eq=False)
class _DeferredChanges:
    """Changes of tensors in files, which are made while the files are copied."""

    floats: dict[ir.Value, list[InitializerChange]] = field(default_factory=dict)
    quantised: dict[ir.Value, OutputTensor] = field(default_factory=dict)

    @property
    def values(self) -> set[ir.Value]:
        """The initializers that change."""
        return self.floats.keys() | self.quantised.keys()


def _change_or_defer(plan: Plan, model: ir.Model, sites: Sites, run: MergeRun) -> _DeferredChanges:
    """Change the weights that are in memory. Returns the changes of those in files."""
    deferred, quantised = _DeferredChanges(), dict[ir.Value, list[InitializerChange]]()
    for step, alike in with_readers_alike(sites, plan.steps):
        for change in isolate_changes(model, sites, step, alike):
            if is_quantised(change.value):
                quantised.setdefault(change.value, []).append(change)
            elif isinstance(change.value.const_value, ir.ExternalTensor):
                deferred.floats.setdefault(change.value, []).append(change)
            else:
                statistics = change_in_memory(change)
                run.statistics.add(() if step.is_replacement else (statistics,))
    if not quantised:
        return deferred
    from lora_export.graph.merge.requantise import quantised_change, requantise  # few graphs have quantised weights

    weights = [quantised_change(value, changes) for value, changes in quantised.items()]
    layers, made = requantise(model, weights, run.min_retention, run.backend)
    run.layers = tuple(layers)
    for tensor in made:
        found = tensor.place(run.backend)
        if found is None:
            deferred.quantised[tensor.value] = tensor.output
        else:
            run.statistics.add(found)
    return deferred


def _moved_tensors(model: ir.Model, changes: _DeferredChanges) -> Iterator[MovedTensor]:
    """The tensors in files, in the order of the initializers."""
    source_of = functools.cache(lambda path: Path(os.path.realpath(path)))  # many tensors are in one file
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and not isinstance(tensor, SharedTensor):
            source = source_of(tensor.path)
            output = changes.quantised.get(value) or _output_tensor(tensor, changes.floats.get(value, []))
            yield MovedTensor(value, source, output)


def _output_tensor(tensor: ir.ExternalTensor, changes: Sequence[InitializerChange]) -> OutputTensor:
    start, name = tensor.offset or 0, changes[0].step.weight if changes else tensor.name or ""
    if not changes:  # copied as bytes: an element may have four bits
        whole = Entry(name, np.dtype(np.uint8), (tensor.nbytes,), start, start + tensor.nbytes)
        return OutputTensor(whole, None, name, whole.dtype)
    shape = tuple(int(size) for size in tensor.shape.numpy())
    entry = Entry(name, tensor.dtype.numpy(), shape, start, start + tensor.nbytes)
    if not changes[0].is_block:
        return OutputTensor(entry, changes[0].step, name, entry.dtype)
    rows, stacked = shape[-2] if len(shape) > 2 else entry.rows, entry
    if changes[0].cut_shape is not None:
        stacked = replace(entry, shape=changes[0].cut_shape)
    elif len(shape) > 2:  # a stack of matrices, as one matrix
        stacked = replace(entry, shape=(math.prod(shape[:-1]), shape[-1]))
    return OutputTensor(stacked, None, name, entry.dtype, tuple(change.patch(rows) for change in changes))
