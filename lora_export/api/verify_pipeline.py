"""A merged diffusion pipeline, judged against its base: each model, and every other file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.api.merge_pipeline import parts_by_model
from lora_export.api.verify_record import VerifyRequest
from lora_export.api.verify_weights import judge_weights
from lora_export.lora import Adapter
from lora_export.provenance import adapter_records
from lora_export.storage.hashes import file_sha256
from lora_export.storage.manifest import MANIFEST
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.parity import Outcome
from lora_export.weights.pipeline import Pipeline, open_pipeline

ORDER = (Outcome.SAME, Outcome.UNDECIDED, Outcome.DIFFERENT)


def audit_pipeline(request: VerifyRequest, adapters: Sequence[Adapter]) -> Audit:
    """The audits of all models that the adapters change as one.

    Every other file of the pipeline must be that of the base, byte for byte. Raises InputRefused as `judge_weights`,
    and for a component that the pipeline lacks.
    """
    candidate, base, strengths = request.candidate, request.checkpoint, request.weights
    pipeline = open_pipeline(base)
    parts, notes = parts_by_model(pipeline, adapters, strengths)
    names = [adapter.name for adapter in adapters]
    audits = {}
    for folder, own in parts.items():
        one = replace(request, candidate=candidate / folder, base=base / folder)
        audits[folder] = judge_weights(replace(one, adapters=own.adapters, weights=own.strengths), names)
    other = tuple(_other_differences(pipeline, candidate, parts))
    whole = _joined(audits)
    whole = replace(whole, notes=(*notes, *whole.notes))
    if other:
        whole = replace(whole, outcome=Outcome.DIFFERENT, files=(*whole.files, *other))
    about = {
        "candidate": str(candidate),
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
        outcome=max((audit.outcome for audit in audits.values()), key=ORDER.index),
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
    own = {path.as_posix() for path in pipeline.other_files(changed)}
    theirs = {
        path.relative_to(candidate).as_posix()
        for path in candidate.rglob("*")
        if path.is_file() and path.relative_to(candidate).parts[0] not in changed and path.name != MANIFEST
    }
    hidden = {name for name in theirs if any(part.startswith(".") for part in name.split("/"))}
    yield from (f"{name} is missing" for name in sorted(own - theirs))
    yield from (f"{name} is new" for name in sorted(theirs - own - hidden))
    for name in sorted(own & theirs):
        one, other = pipeline.path / name, candidate / name
        if one.stat().st_size != other.stat().st_size or file_sha256(one) != file_sha256(other):
            yield f"{name} has other bytes than the base's"
