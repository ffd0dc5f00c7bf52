"""A merge into a checkpoint: a Hugging Face folder or a .safetensors file."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from lora_export.api.merge_base import merge_of, opened_base, plan_over
from lora_export.api.merge_request import MergeRequest, MergeResult, float32_remedy
from lora_export.callbacks import in_bytes, note_each
from lora_export.lora import Adapter
from lora_export.options.spelling import command, named
from lora_export.plan import Plan
from lora_export.storage import atomic_output
from lora_export.storage.hashes import file_sha256
from lora_export.storage.hub_cache import HUB_NAME, hub_name
from lora_export.weights.checkpoint import Checkpoint, custom_code, open_checkpoint
from lora_export.weights.merge import output_size, refuse_before_merge
from lora_export.weights.merge_report import MergeReport, QuantisedLayer, refuse_no_change
from lora_export.weights.one_pass import Merging
from lora_export.weights.quantised import caution_for

if TYPE_CHECKING:
    from lora_export.weights.calibrated_rounding import LayerInputs
    from lora_export.weights.gguf.base import GgufBase


def merging_into_checkpoint(request: MergeRequest) -> Merging[MergeResult]:
    """Plan and write the merge (see `one_pass`). Raises as `merge`; nothing is left behind then."""
    checkpoint = opened_base(request)
    why_alone = ""
    if request.is_shared:
        from lora_export.api.merge_shards import make_shards, note_on_one_file  # few merges start processes

        why_alone = note_on_one_file(request, checkpoint)
    is_shared = request.is_shared and not why_alone
    floats = None if request.float_base is None else open_checkpoint(request.float_base)
    if floats is not None:
        from lora_export.weights.quantisation_loss import refuse_other_shapes  # few merges measure it

        refuse_other_shapes(checkpoint, floats)
    # Raises for links that lead out of the folder: before the work, not after it.
    companions = sum((checkpoint.path / name).stat().st_size for name in checkpoint.other_files())
    steps = plan_over(checkpoint, request)
    refuse_before_merge(steps, checkpoint)
    if request.keep_residual is not None:
        from lora_export.weights.residuals.archive import refuse_residual  # few merges keep one

        refuse_residual(steps, checkpoint)
    more = notes_on_checkpoint(checkpoint, request.adapters, kept=request.keep_quantised)
    notes = request.report_notes(steps, [*([why_alone] if why_alone else ()), *more])
    if request.dry_run:
        return MergeResult(request.output, steps, None, notes)
    layers: tuple[QuantisedLayer, ...] = ()
    is_kept, is_file = request.keep_quantised, not checkpoint.is_folder
    least = checkpoint.nbytes if is_kept else output_size(steps, checkpoint, request.stored)
    with (
        request.backend() as backend,
        request.staged(least + companions, is_file=is_file) as folder,
        request.staged_residual() as residual,
    ):
        calibration, of_calibration = calibration_inputs(request, steps, checkpoint)
        settings = request.combined.settings | of_calibration
        if is_kept:
            from lora_export.weights.quantised_layers import keep_quantised  # few bases are

            checkpoint, layers = keep_quantised(
                steps,
                checkpoint,
                request.min_retention,
                rescale=request.rescale,
                progress_of=functools.partial(in_bytes, request.on_progress, "measuring"),
                calibration=calibration,
            )
        size = output_size(steps, checkpoint, request.stored)
        if is_kept:
            atomic_output.refuse_lack_of_space(folder, size + companions)
        begun = time.perf_counter()
        made = make_shards(request, steps, checkpoint, folder, settings, size) if is_shared else {}
        merge = merge_of(request, steps, checkpoint, backend, settings, calibration)
        progress = in_bytes(request.on_progress, "merging", size)
        report = yield from merge.into(folder, file_name=request.output.name, progress=progress, made=made)
        refuse_no_change(report)
        seconds = time.perf_counter() - begun
        report = replace(report, layers=layers, base_bytes=checkpoint.nbytes if layers else 0, seconds=seconds)
        if floats is not None:
            report, more = _with_quantisation(report, checkpoint, floats, steps, request)
            notes = (*notes, *more)
        residual_bytes = None if residual is None else _keep_residual(request, steps, checkpoint, folder, residual)
    remedy = (lambda: f"{named('min_retention', 0.9)} makes them floats") if is_kept else float32_remedy
    request.warn_of_rounding(report, remedy)
    return MergeResult(request.output, steps, report, notes, residual_bytes)


def calibration_inputs(
    request: MergeRequest, steps: Plan, base: Checkpoint | GgufBase
) -> tuple[Mapping[str, LayerInputs], dict[str, str]]:
    """The inputs of the layers that change, and what the record has of the file that they are from. See `calibrate`."""
    if request.calibration is None:
        return {}, {}
    from lora_export.api.calibration import calibrate  # few merges run a model
    from lora_export.weights.gguf.base import GgufBase

    has_new_scales = request.rescale and isinstance(base, GgufBase)
    others = "the others, and those that get new scales, are" if has_new_scales else "the others are"
    inputs = calibrate(steps, base, request.calibration, request.on_message, others=others)
    if request.rounding == "nearest":
        inputs = {name: replace(one, is_fed_back=False) for name, one in inputs.items()}
    return inputs, {"calibration": file_sha256(request.calibration)}


def _keep_residual(request: MergeRequest, steps: Plan, base: Checkpoint, merged: Path, path: Path) -> int:
    """Write the residual of a merge that is not published yet. Returns its size in bytes."""
    from lora_export.weights.residuals.archive import write_residual

    size = sum(step.spec.nbytes for step in steps.steps)
    write_residual(
        path,
        steps,
        base,
        merged if base.is_folder else merged / request.output.name,
        hashing=request.hashing,
        settings=request.plan_settings,
        progress=in_bytes(request.on_progress, "keeping the residual", size),
    )
    written = path.stat().st_size
    request.on_message(
        f"note: {request.keep_residual} has {written:,} bytes, {written / base.nbytes:.2%} of the base: with it and "
        f"the adapters, `{command('unmerge')}` makes the base again"
    )
    return written


def _with_quantisation(
    report: MergeReport, base: Checkpoint, floats: Checkpoint, steps: Plan, request: MergeRequest
) -> tuple[MergeReport, list[str]]:
    """The report with the quantisation error of each weight, and the notes on it."""
    from lora_export.weights.quantisation_loss import bytes_to_measure, measure_quantisation, notes_on_quantisation

    progress = in_bytes(request.on_progress, "measuring the quantisation", bytes_to_measure(base))
    losses = measure_quantisation(base, floats, steps, report.results, progress)
    notes = list(notes_on_quantisation(base, floats, losses))
    note_each(request.on_message, notes)
    return replace(report, quantisation=losses), notes


def notes_on_checkpoint(checkpoint: Checkpoint, adapters: Sequence[Adapter], *, kept: bool = False) -> list[str]:
    """What the caller of a merge should know of its base."""
    notes = list(_other_bases(adapters, checkpoint))
    if code := custom_code(checkpoint.config):
        notes.append(f"the base's config names code of its own ({code}): it is copied, and was not run")
    if tasks := checkpoint.own_adapters:
        notes.append(
            f"the base's weights hold adapters of their own ({', '.join(tasks)}): its original weights are merged, and "
            "the output has none of these adapters"
        )
    if checkpoint.quantised:
        schemes = ", ".join(sorted({tensor.scheme for tensor in checkpoint.quantised.values()}))
        number = len(checkpoint.quantised)
        what = "keep their scheme where it can hold the change" if kept else "are stored as floats"
        notes.append(
            f"{number} quantised weights ({schemes}) {what}. An adapter that was trained beside them fits them; their "
            "distance from the original float weights stays in the output"
        )
        notes += sorted({caution for tensor in checkpoint.quantised.values() if (caution := caution_for(tensor))})
    return notes + [
        f"{name} contains weights too, unmerged ones; it is left out" for name in checkpoint.unmerged_weights()
    ]


def _other_bases(adapters: Sequence[Adapter], base: Checkpoint) -> Iterator[str]:
    """Adapters that name another model of the Hub than this base. A note only: a name does not identify weights.

    A local path in an adapter's config means nothing on this machine.
    """
    own = [name for name in (hub_name(base.path), base.config.get("_name_or_path")) if _is_hub_name(name)]
    known = {_without_owner(name) for name in (*own, *base.path.absolute().parts)}
    for adapter in adapters:
        named = adapter.metadata.get("base_model_name_or_path")
        if own and _is_hub_name(named) and _without_owner(named) not in known:
            yield f"{adapter.name} was made for {named}, the base is {own[0]}: shapes that agree prove nothing"


def _is_hub_name(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _without_owner(name: str) -> str:
    """The model's name alone: mirrors store the same weights under another owner."""
    return name.rpartition("/")[2].casefold()
