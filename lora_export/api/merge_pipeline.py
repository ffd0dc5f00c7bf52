"""Adapters into a diffusion pipeline: each model that they change is merged, the rest is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_export import plan, provenance
from lora_export.adapters.combine import combine_in_plan
from lora_export.api.merge_base import merge_of
from lora_export.api.merge_checkpoint import notes_on_checkpoint
from lora_export.api.merge_request import MergeRequest, MergeResult, float32_remedy
from lora_export.callbacks import in_bytes
from lora_export.errors import MatchError, Misfit
from lora_export.lora import Adapter
from lora_export.plan import Plan
from lora_export.plan.build import checked_strengths
from lora_export.plan.diffusion import components_of, of_component
from lora_export.storage import input_files
from lora_export.storage.hashes import ALGORITHMS
from lora_export.storage.manifest import read_manifest, write_manifest
from lora_export.weights.apply_step import Backend
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from lora_export.weights.merge import output_size, refuse_before_merge
from lora_export.weights.merge_report import MergeReport, refuse_no_change
from lora_export.weights.one_pass import alone
from lora_export.weights.pipeline import Pipeline, open_pipeline


@dataclass
class ModelParts:
    """What adapters change in one model of a pipeline."""

    adapters: list[Adapter] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)


def parts_by_model(
    pipeline: Pipeline, adapters: Sequence[Adapter], strengths: Sequence[float]
) -> tuple[dict[str, ModelParts], tuple[str, ...]]:
    """The parts of the adapters by the folder of their model, and notes for the user.

    A part without effect, as before training, is left out with a note: its model stays as it is. Raises InputRefused
    for a component that the pipeline lacks, and for an adapter that has no effect on any model.
    """
    parts: dict[str, ModelParts] = {}
    notes = []
    for adapter, strength in zip(adapters, checked_strengths(adapters, strengths), strict=True):
        components = components_of(adapter)
        for component in components:
            folder = pipeline.folder_of(component, components)
            part = of_component(adapter, component)
            if part.is_identity:
                notes.append(f"{adapter.name} changes nothing in {folder}: its values there are those before training")
                continue
            own = parts.setdefault(folder, ModelParts())
            own.adapters.append(part)
            own.strengths.append(strength)
    return parts, tuple(notes)


@dataclass(frozen=True, eq=False)
class ModelMerge:
    """One model of a pipeline, and what is merged into it."""

    folder: str
    checkpoint: Checkpoint
    plan: Plan


def _plan_models(request: MergeRequest, pipeline: Pipeline) -> tuple[list[ModelMerge], tuple[str, ...]]:
    """A plan for each model that the adapters change, and notes on the models that they leave as they are.

    Raises InputRefused for a component that the pipeline lacks, and for a variant that a changed model lacks,
    MatchError with the misfits of all models.
    """
    parts, notes = parts_by_model(pipeline, request.adapters, request.weights)
    merges: list[ModelMerge] = []
    misfits: list[Misfit] = []
    targets = 0
    for folder, own in parts.items():
        checkpoint = open_checkpoint(pipeline.models[folder], variant=request.variant)
        try:
            specs, rules, layout = checkpoint.specs, checkpoint.rules, request.layout
            steps = plan.make(own.adapters, specs, strengths=own.strengths, layout=layout, rules=rules)
        except MatchError as error:
            misfits += [replace(misfit, problem=f"{folder}: {misfit.problem}") for misfit in error.misfits]
            targets += error.targets
            continue
        steps = combine_in_plan(steps, request.combined, [adapter.name for adapter in request.adapters])
        refuse_before_merge(steps, checkpoint)
        merges.append(ModelMerge(folder, checkpoint, steps))
        targets += len(steps.steps)
    if misfits:
        raise MatchError(misfits, targets=targets)
    return merges, notes


def _plan_of_all(request: MergeRequest, merges: Sequence[ModelMerge]) -> Plan:
    """The plans of all models as one, for a report: each tensor's name begins with the folder of its model."""
    steps = [
        replace(step, spec=replace(step.spec, name=f"{each.folder}/{step.weight}", region=None))
        for each in merges
        for step in each.plan.steps
    ]
    return Plan(
        adapters=tuple(request.adapters),
        strengths=tuple(request.strengths),
        steps=tuple(steps),
        kept=tuple(f"{each.folder}/{name}" for each in merges for name in each.plan.kept),
        notes=tuple(f"{each.folder}: {note}" for each in merges for note in each.plan.notes),
        spellings=tuple(_spelling_of(adapter, merges) for adapter in request.adapters),
    )


def _spelling_of(adapter: Adapter, merges: Sequence[ModelMerge]) -> str:
    """How an adapter's names relate to those of the models: the one that is no equality, where there is one."""
    found = [
        spelling
        for each in merges
        for one, spelling in zip(each.plan.adapters, each.plan.spellings, strict=True)
        if one.name == adapter.name
    ]
    return next((spelling for spelling in found if spelling != "same"), "same")


def merge_into_pipeline(request: MergeRequest) -> MergeResult:
    """Plan and write the merge. Every merged model has a manifest of its own. Raises as `merge`."""
    pipeline = open_pipeline(request.base)
    merges, unchanged = _plan_models(request, pipeline)
    whole = _plan_of_all(request, merges)
    on_models = [note for each in merges for note in notes_on_checkpoint(each.checkpoint, request.adapters)]
    notes = request.report_notes(whole, list(dict.fromkeys((*unchanged, *on_models))))
    if request.dry_run:
        return MergeResult(request.output, whole, None, notes)
    report = _write(request, pipeline, merges)
    request.warn_of_rounding(report, float32_remedy)
    return MergeResult(request.output, whole, report, notes)


def _write(request: MergeRequest, pipeline: Pipeline, merges: Sequence[ModelMerge]) -> MergeReport:
    others = list(pipeline.other_files({each.folder for each in merges}))
    size = sum((pipeline.path / relative).stat().st_size for relative in others)
    companions = [each.checkpoint.path / name for each in merges for name in each.checkpoint.other_files()]
    size += sum(path.stat().st_size for path in companions)
    size += sum(output_size(each.plan, each.checkpoint, request.stored) for each in merges)
    progress = in_bytes(request.on_progress, "merging", sum(each.checkpoint.nbytes for each in merges))
    settings = request.combined.settings
    reports = {}
    with request.staged(size, is_file=False) as stage:
        for each in merges:
            (stage / each.folder).mkdir()
            merge = merge_of(request, each.plan, each.checkpoint, Backend(), settings)
            reports[each.folder] = alone(merge.into(stage / each.folder, progress=progress))
        report = _report_of_all(reports)
        refuse_no_change(report)
        for relative in others:
            (stage / relative).parent.mkdir(parents=True, exist_ok=True)
            input_files.copy_file(pipeline.path / relative, stage / relative)
        record = provenance.record(request.adapters, request.strengths, {}, (), {"models": sorted(reports), **settings})
        write_manifest(stage, record, _known_hashes(stage, reports))
    return report


def _known_hashes(stage: Path, models: Iterable[str]) -> dict[str, Mapping[str, str]]:
    """The hashes of the merged models' files, from their manifests."""
    known: dict[str, Mapping[str, str]] = {}
    for folder in models:
        files = read_manifest(stage / folder)["files"]
        known |= {
            f"{folder}/{name}": {kind: facts[kind] for kind in ALGORITHMS if kind in facts}
            for name, facts in files.items()
        }
    return known


def _report_of_all(reports: Mapping[str, MergeReport]) -> MergeReport:
    """The reports of all models as one: each weight's name begins with the folder of its model."""
    return MergeReport(
        results=tuple(
            replace(result, weight=f"{folder}/{result.weight}")
            for folder, report in reports.items()
            for result in report.results
        ),
        copied=sum(report.copied for report in reports.values()),
        bytes=sum(report.bytes for report in reports.values()),
        replaced_weights=tuple(
            f"{folder}/{name}" for folder, report in reports.items() for name in report.replaced_weights
        ),
        seconds=sum(report.seconds for report in reports.values()),
        spellings={name: spelling for report in reports.values() for name, spelling in report.spellings.items()},
    )
