"""The tensors of a merged GGUF file, compared with W + s·BA on the scales of the base. Nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lora_export import plan
from lora_export.adapters.combine import combine_in_plan
from lora_export.api.load import load_adapters
from lora_export.api.verify_record import VerifyRequest, recorded_explanation
from lora_export.artifacts.artifact import Artifact
from lora_export.callbacks import in_bytes
from lora_export.errors import InputRefused
from lora_export.provenance import adapter_records
from lora_export.verification.against_checkpoint import Audit, audit_gguf
from lora_export.version import __version__
from lora_export.weights.gguf.base import open_base
from lora_export.weights.tied_tensors import tied_as_remedy, ties_of


def judge_gguf(candidate: Artifact, request: VerifyRequest) -> Audit:
    """A merged GGUF file against its base, tensor by tensor. Needs neither PyTorch nor the package gguf.

    Raises InputRefused where one of the files is no GGUF file of a model, and where both are the same.
    """
    origin, merged = open_base(request.checkpoint), open_base(candidate.path)
    if origin.file.path.resolve() == merged.file.path.resolve():
        raise InputRefused(f"{candidate.path} is the base itself")
    loaded = load_adapters(request.adapters, of_models=True)
    with tied_as_remedy(origin.checkpoint, request.tied):
        steps = plan.make(
            loaded,
            origin.checkpoint.specs,
            strengths=request.weights,
            rules=origin.checkpoint.rules,
            ties=ties_of(origin.checkpoint, request.tied),
        )
    steps = combine_in_plan(steps, request.combined)
    for note in [*(note for adapter in loaded for note in adapter.notes), *steps.notes]:
        request.on_message(f"note: {note}")
    types = candidate.record.settings.get("types")
    progress = in_bytes(request.on_progress, "judging", merged.file.size)
    audit = audit_gguf(steps, origin, merged, types if isinstance(types, Mapping) else {}, progress=progress)
    about = {
        "candidate": str(candidate.path),
        "judged_files": [candidate.path.name],
        "base": str(request.checkpoint),
        **request.settings,
        "adapters": adapter_records(loaded, request.weights or (1.0,) * len(loaded)),
        "spellings": {adapter.name: one for adapter, one in zip(loaded, steps.spellings, strict=True)},
        "lora_export": __version__,
        "numpy": np.__version__,
    }
    recorded = recorded_explanation(audit, candidate, request, loaded, request.checkpoint)
    return replace(audit, recorded=recorded, about=about)
