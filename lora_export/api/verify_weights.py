"""The weights of a merged checkpoint, GGUF file or pipeline, compared with W + s·BA. Needs no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_export.api.load import load_adapters
from lora_export.api.merge_base import planned
from lora_export.api.merge_pipeline import parts_by_model
from lora_export.api.verify_record import VerifyRequest, recorded_explanation
from lora_export.artifacts.artifact import Artifact
from lora_export.callbacks import in_bytes, note_each
from lora_export.errors import InputRefused, count
from lora_export.lora import Adapter
from lora_export.options.spelling import named
from lora_export.plan import Plan, Tied
from lora_export.provenance import adapter_records
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hashes import file_sha256
from lora_export.storage.manifest import OF_THE_OUTPUT
from lora_export.verification import against_checkpoint
from lora_export.verification.against_checkpoint import Audit, CalibratedLayer, audit_gguf
from lora_export.verification.companion_files import compare_files
from lora_export.verification.judged_files import loaded_files
from lora_export.verification.parity import SEVERITY, Findings, Outcome
from lora_export.version import __version__
from lora_export.weights.calibrated_rounding import LayerInputs
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.gguf.base import GgufBase
from lora_export.weights.merge import refuse_broken_tie
from lora_export.weights.pipeline import Pipeline, open_pipeline
from lora_export.weights.quantised import without_shared_parts
from lora_export.weights.quantised.comfyui_files import LAYERS_IN_HEADER, without_layers
from lora_export.weights.quantised_layers import float_modules


class Judged(NamedTuple):
    """The plan that was made again, what was found of the tensors, and the names of the files that were judged."""

    plan: Plan
    audit: Audit
    files: Sequence[str]


def judge_weights(candidate: Artifact, request: VerifyRequest, together: Sequence[str] = ()) -> Audit:
    """A merged checkpoint or GGUF file against W + s·BA, weight by weight. Needs no PyTorch.

    Of one model of a pipeline, `together` are the names of all adapters (see `combine_in_plan`). Raises InputRefused
    where candidate and base are the same, or of different kinds.
    """
    if request.checkpoint.path.resolve() == candidate.path.resolve():
        raise InputRefused(f"{candidate.path} is the base itself")
    loaded = load_adapters(request.adapters, of_models=True)
    is_gguf = ArtifactKind.GGUF in (candidate.kind, request.checkpoint.kind)
    judged = _judged_gguf(candidate, request, loaded) if is_gguf else _judged(candidate, request, loaded, together)
    about = {
        "candidate": str(candidate.path),
        "judged_files": sorted(judged.files),
        "base": str(request.checkpoint.path),
        **request.settings,
        "adapters": adapter_records(loaded, request.weights or (1.0,) * len(loaded)),
        "spellings": {adapter.name: one for adapter, one in zip(loaded, judged.plan.spellings, strict=True)},
        "lora_export": __version__,
        "numpy": np.__version__,
    }
    return replace(judged.audit, recorded=recorded_explanation(judged.audit, candidate, request, loaded), about=about)


def _judged_gguf(candidate: Artifact, request: VerifyRequest, adapters: Sequence[Adapter]) -> Judged:
    """A merged GGUF file, tensor by tensor, on the scales of the base. The package gguf is not needed."""
    origin = request.checkpoint.gguf
    merged = candidate.gguf
    steps = planned(origin.checkpoint, adapters, request)
    note_each(request.on_message, [*(note for adapter in adapters for note in adapter.notes), *steps.notes])
    stated = candidate.record.settings.get("types")
    types = stated if isinstance(stated, Mapping) else {}
    progress = in_bytes(request.on_progress, "judging", merged.file.size)
    calibrated, not_judged = _calibrated_layers(candidate, request, steps, origin)
    new = candidate.record.settings.get("rescaled")
    rescaled = new if isinstance(new, list) else []
    audit = audit_gguf(steps, origin, merged, types, rescaled=rescaled, progress=progress, calibrated=calibrated)
    return Judged(steps, audit.with_files(not_judged), [candidate.path.name])


def _judged(
    candidate: Artifact, request: VerifyRequest, adapters: Sequence[Adapter], together: Sequence[str]
) -> Judged:
    """A merged folder or .safetensors file, and the files beside its weights."""
    layout, origin = request.layout, request.checkpoint.dequantised
    merged = candidate.dequantised
    files = loaded_files(candidate, merged)
    if merged.quantised:
        origin = replace(origin, quantised=without_shared_parts(origin.quantised))
        merged = replace(merged, quantised=without_shared_parts(merged.quantised))
    steps = planned(origin, adapters, request, together, may_add=True, layout=layout, unknown_layout_ok=True)
    if steps.tied == Tied.ERROR:
        refuse_broken_tie(steps, origin)
    note_each(request.on_message, [*(note for adapter in adapters for note in adapter.notes), *steps.notes])
    dtypes = {spec.dtype for spec in merged.specs if spec.is_float}
    promoted = {name: one for name, one in origin.quantised.items() if steps.output_name(name) not in merged.quantised}
    stored = {name: merged.quantised[steps.output_name(name)] for name in origin.quantised if name not in promoted}
    grids = {
        name: grid
        for name, one in stored.items()
        if one.scheme != origin.quantised[name].scheme and (grid := origin.quantised[name].finer())
    }
    new = _recorded(candidate, "rescaled")
    grids |= {name: one.with_new_scales for name, one in stored.items() if one.scaling and one.name in new}
    finer = [name for name, grid in grids.items() if not grid.is_rescaled]
    floats = float_modules(origin, steps, promoted, finer)
    record = _other_record(candidate, steps, promoted, finer)
    header = _other_header(origin, merged, promoted if stored else None)
    calibrated, not_judged = _calibrated_layers(candidate, request, steps, origin)
    stated = floats if stored and any(floats[::2]) else ()
    beside = compare_files(request.checkpoint, candidate, adapters, dtypes, stated)
    progress = in_bytes(request.on_progress, "judging", merged.nbytes)
    audit = against_checkpoint.audit(
        steps,
        replace(origin, grids=grids),
        merged,
        layout=layout,
        progress=progress,
        calibrated=calibrated,
        in_step=request.in_step,
    )
    found = not_judged + beside + files.others + record + header
    return Judged(steps, audit.with_files(found), list(files.judged))


def _calibrated_layers(
    candidate: Artifact, request: VerifyRequest, steps: Plan, base: Checkpoint | GgufBase
) -> tuple[dict[str, CalibratedLayer], Findings]:
    """The layers that the record names as calibrated, with inputs where the calibration is given; what is not judged.

    Raises InputRefused for another calibration than that of the record.
    """
    settings, path = candidate.record.settings, request.calibration
    stated, digest = settings.get("calibrated"), settings.get("calibration")
    names = [str(name) for name in stated] if isinstance(stated, list) else []
    if path is not None and not (names and file_sha256(path) == digest):
        what = f"names another file (SHA-256 {digest})" if names else "names no calibrated layers"
        raise InputRefused(f"{named('calibration', path)}: the record of {candidate.path} {what}")
    inputs: Mapping[str, LayerInputs] = {}
    if path is not None:
        from lora_export.api.calibration import calibrate  # few proofs of weights run a model

        inputs = calibrate(steps, base, path, request.on_message)
    layers = {name: CalibratedLayer(inputs.get(name)) for name in names}
    if unknown := [name for name in names if name not in inputs]:
        part = (
            f"which of the two values around W + s·BA the numbers of {count(len(unknown), 'calibrated layer')} are. "
            f"Give their inputs: {named('calibration', 'TEXTS')}"
        )
        return layers, Findings(not_judged=(part,))
    return layers, Findings()


def _other_record(candidate: Artifact, steps: Plan, floats: Iterable[str], finer: Iterable[str]) -> Findings:
    """Where the record of a merge that stayed quantised names other promoted weights than are floats, or 8 bits."""
    if "quantised" not in candidate.record.settings:
        return Findings()
    found = {"promoted": (floats, "are floats"), "finer": (finer, "have 8 bits")}
    return Findings(
        faults=tuple(
            f"the record names {len(_recorded(candidate, key))} {key} weights, and other ones {what}"
            for key, (names, what) in found.items()
            if _recorded(candidate, key) != sorted(map(steps.output_name, names))
        )
    )


def _recorded(candidate: Artifact, key: str) -> list[Any]:
    """The weights that the record of a merge that stayed quantised has under this key."""
    stated = candidate.record.settings.get("quantised")
    names = stated.get(key) if isinstance(stated, Mapping) else None
    return names if isinstance(names, list) else []


def _other_header(base: Checkpoint, merged: Checkpoint, promoted: Iterable[str] | None) -> Findings:
    """Where the headers of files without a config state their 8-bit layers otherwise than the base's do."""
    floats = None if promoted is None else [name.removesuffix(".weight") for name in promoted]
    expected = [without_layers(shard.metadata, floats) for shard in base.shards.values()]
    found = [shard.metadata for shard in merged.shards.values()]
    one, other = (
        [json.loads(each[LAYERS_IN_HEADER]) for each in every if LAYERS_IN_HEADER in each]
        for every in (expected, found)
    )
    return Findings() if one == other else Findings(faults=(f"{LAYERS_IN_HEADER} of the header is not the base's",))


def audit_pipeline(candidate: Artifact, request: VerifyRequest, adapters: Sequence[Adapter]) -> Audit:
    """The audits of all models that the adapters change as one.

    Every other file of the pipeline must be that of the base, byte for byte. Raises InputRefused as `judge_weights`,
    and for a component that the pipeline lacks.
    """
    base, strengths = request.checkpoint.path, request.weights
    pipeline = open_pipeline(base)
    parts, notes = parts_by_model(pipeline, adapters, strengths)
    names = [adapter.name for adapter in adapters]
    audits = {}
    for folder, own in parts.items():
        part = Artifact(candidate.path / folder, ArtifactKind.CHECKPOINT)
        input_files.must_exist(part.path, "candidate")
        origin = Artifact(base / folder, ArtifactKind.CHECKPOINT, like=part)
        one = replace(request, origin=origin, adapters=own.adapters, weights=own.strengths)
        audits[folder] = judge_weights(part, one, names)
    other = tuple(_other_differences(pipeline, candidate.path, parts))
    whole = _joined(audits)
    whole = replace(whole, notes=(*notes, *whole.notes))
    if other:
        whole = replace(whole, outcome=Outcome.DIFFERENT, files=(*whole.files, *other))
    about = {
        "candidate": str(candidate.path),
        "base": str(base),
        "models": {folder: dict(audit.about) for folder, audit in audits.items()},
        "adapters": adapter_records(adapters, strengths or [1.0] * len(adapters)),
    }
    return replace(whole, about=about)


def _joined(audits: Mapping[str, Audit]) -> Audit:
    """The audits of several models as one: each tensor's name begins with the folder of its model."""

    def lines(field: str) -> tuple[str, ...]:
        return tuple(f"{folder}: {line}" for folder, audit in audits.items() for line in getattr(audit, field))

    return Audit(
        outcome=max((audit.outcome for audit in audits.values()), key=SEVERITY.index),
        weights=tuple(
            replace(weight, name=f"{folder}/{weight.name}")
            for folder, audit in audits.items()
            for weight in audit.weights
        ),
        recorded=lines("recorded"),
        files=lines("files"),
        not_judged=lines("not_judged"),
        notes=lines("notes"),
    )


def _other_differences(pipeline: Pipeline, candidate: Path, changed: Mapping[str, Any]) -> Iterator[str]:
    """The files outside of the judged models that are missing, new or other than the base's."""
    own = {path.as_posix() for path in pipeline.other_files(changed) if path.name not in OF_THE_OUTPUT}
    theirs = {
        path.relative_to(candidate).as_posix()
        for path in candidate.rglob("*")
        if path.is_file() and path.relative_to(candidate).parts[0] not in changed and path.name not in OF_THE_OUTPUT
    }
    hidden = {name for name in theirs if any(part.startswith(".") for part in name.split("/"))}
    yield from (f"{name} is missing" for name in sorted(own - theirs))
    yield from (f"{name} is new" for name in sorted(theirs - own - hidden))
    for name in sorted(own & theirs):
        one, other = pipeline.path / name, candidate / name
        if one.stat().st_size != other.stat().st_size or file_sha256(one) != file_sha256(other):
            yield f"{name} has other bytes than the base's"
