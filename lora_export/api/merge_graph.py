"""A merge into the weights of an .onnx file."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from lora_export import plan
from lora_export.api.generation_files import copy_generation_files, size_of_generation_files
from lora_export.api.merge_request import MergeRequest, MergeResult, combined_pairs
from lora_export.callbacks import in_bytes
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.copy_parts import MergeRun
from lora_export.graph.merge.merge_graph import merge_graph, refuse_before_graph_merge
from lora_export.graph.onnx_file.reading import open_graph
from lora_export.graph.onnx_file.shared_weights import sharing
from lora_export.graph.refusals import base_as_remedy, checkpoint_as_remedy
from lora_export.graph.tied_tables import tie_notes, with_rows_of_equal_tables
from lora_export.options.spelling import command
from lora_export.plan.spelling import respelled
from lora_export.storage import input_files
from lora_export.weights.merge_report import refuse_no_change


def merge_into_graph(request: MergeRequest) -> MergeResult:
    """Plan and write the merge. Raises as `merge`."""
    input_files.must_exist(request.base, "base model")
    graph = open_graph(request.base)
    checkpoint = None
    if request.checkpoint is not None:  # the names of the graph's weights are in it
        from lora_export.weights.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(request.checkpoint)
    sites = find_sites(graph.model, checkpoint)
    if checkpoint is not None:
        request = replace(request, adapters=respelled(request.adapters, sites.specs, checkpoint.rules))
    helped = base_as_remedy(sites) if checkpoint is None else contextlib.nullcontext()
    with checkpoint_as_remedy(request.adapters, has_checkpoint=checkpoint is not None), helped:
        steps = plan.make(request.adapters, sites.specs, strengths=request.weights)
    alone, steps = steps, with_rows_of_equal_tables(steps, sites, checkpoint)
    steps = combined_pairs(steps, request.combined)
    refuse_before_graph_merge(steps, graph, sites, requantise=request.requantize)
    more = [*sites.notes, *tie_notes(alone, steps)]
    if request.requantize:
        from lora_export.graph.quantised.scheme_of_weight import requantise_notes  # few graphs are quantised

        more += requantise_notes(steps, graph.model, sites)
    notes = request.report_notes(steps, more)
    if request.dry_run:
        return MergeResult(request.output, steps, None, notes)
    with (
        request.backend() as backend,
        request.staged(graph.nbytes + size_of_generation_files(request.base), streamed=False) as folder,
    ):
        signed = request.sign is not None
        with sharing(request.share_with, request.output, folder, request.on_message, sign=signed) as shared:
            run = MergeRun(
                file_name=request.output.name,
                min_retention=request.min_retention,
                hashing=request.hashing,
                progress=in_bytes(request.on_progress, "merging", graph.nbytes),
                requantise=request.requantize,
                backend=backend,
                shared=shared,
                external_data=request.external_data,
            )
            report = merge_graph(steps, graph, sites, folder, run, request.combined.settings)
        refuse_no_change(report)
        copy_generation_files(request.base, request.output, folder, request.on_message)
    request.warn_of_rounding(
        report, lambda: f"keep the adapter beside the weights ({command('onnx', 'MODEL.onnx', lora='nodes')})"
    )
    return MergeResult(request.output, steps, report, notes)
