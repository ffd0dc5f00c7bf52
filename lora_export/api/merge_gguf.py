"""A merge into a GGUF file."""

from __future__ import annotations

from lora_export.api.merge_base import planned
from lora_export.api.merge_checkpoint import calibration_inputs
from lora_export.api.merge_request import MergeRequest, MergeResult
from lora_export.callbacks import in_bytes, note_each
from lora_export.options.spelling import named
from lora_export.weights.gguf.base import open_base
from lora_export.weights.gguf.merge import merge_gguf
from lora_export.weights.merge import refuse_before_merge
from lora_export.weights.merge_report import refuse_no_change


def merge_into_gguf(request: MergeRequest) -> MergeResult:
    """Plan and write the merge. Raises as `merge`; nothing is left behind then."""
    base = open_base(request.base)
    steps = planned(base.checkpoint, request.adapters, request)
    refuse_before_merge(steps, base.checkpoint)
    notes = request.report_notes(steps, [])
    if request.dry_run:
        return MergeResult(request.output, steps, None, notes)
    with request.staged(base.file.size) as folder:
        inputs, settings = calibration_inputs(request, steps, base)
        report = merge_gguf(
            steps,
            base,
            folder / request.output.name,
            min_retention=request.min_retention,
            rescale=request.rescale,
            types=request.dtype_of or {},
            calibration=inputs,
            hashing=request.hashing,
            progress=in_bytes(request.on_progress, "merging", base.file.size),
            more_settings={**request.combined.settings, **settings},
        )
        refuse_no_change(report)
    if request.rescale and not report.has_new_scales:
        why = f"no weight gets new scales by {named('rescale')}: those that change are in floats, or in another type"
        note_each(request.on_message, [why])
        notes = (*notes, why)
    request.warn_of_rounding(report, lambda: f"{named('dtype_of', {'*': 'F16'})} keeps it")
    return MergeResult(request.output, steps, report, notes)
