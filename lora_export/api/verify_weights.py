"""The weights of a merged checkpoint, compared with W + s·BA. Nothing is run, and PyTorch is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_export import plan
from lora_export.adapters.combine import combine_in_plan
from lora_export.api.load import load_adapters
from lora_export.api.verify_record import VerifyRequest, recorded_explanation
from lora_export.artifacts.artifact import open_artifact
from lora_export.callbacks import in_bytes
from lora_export.errors import InputRefused, WrongUsage
from lora_export.options.spelling import named
from lora_export.provenance import adapter_records
from lora_export.storage import input_files
from lora_export.verification import against_checkpoint
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.companion_files import compare_files
from lora_export.verification.loaded_files import loaded_files
from lora_export.version import __version__
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.tied_tensors import tied_as_remedy, ties_of
from lora_export.weights.weight_files import variant_like


def judge_weights(request: VerifyRequest, together: Sequence[str] = ()) -> Audit:
    """A merged checkpoint against W + s·BA, weight by weight. Needs no PyTorch.

    Of one model of a pipeline, `together` are the names of all adapters (see `combine_in_plan`).
    """
    candidate, base, layout = request.candidate, request.checkpoint, request.layout
    loaded = load_adapters(request.adapters, of_models=True)
    if not loaded:
        raise WrongUsage(
            f"{named('base')} needs the adapters that were merged ({named('adapters')}){_contained(candidate)}"
        )
    input_files.must_exist(candidate, "candidate")
    with input_files.unchanged(candidate, lambda: input_files.files_of(candidate)):
        merged = open_checkpoint(candidate)
        origin = open_checkpoint(base, dequantise=True, variant=variant_like(Path(base), merged.shards))
        if origin.path.resolve() == merged.path.resolve():
            raise InputRefused(f"{candidate} is the base itself")
        with tied_as_remedy(origin, request.tied):
            steps = plan.make(
                loaded,
                origin.specs,
                strengths=request.weights,
                may_add=True,
                layout=layout,
                unknown_layout_ok=True,
                rules=origin.rules,
                ties=ties_of(origin, request.tied),
            )
        steps = combine_in_plan(steps, request.combined, together)
        for note in [*(note for adapter in loaded for note in adapter.notes), *steps.notes]:
            request.on_message(f"note: {note}")
        files = loaded_files(merged)
        audit = against_checkpoint.audit(
            steps, origin, merged, layout=layout, progress=in_bytes(request.on_progress, "judging", merged.nbytes)
        )
        for found in (compare_files(base, candidate, loaded), files.others):
            audit = audit.with_files(found)
    recorded = recorded_explanation(audit, request, loaded, base)
    about = {
        "candidate": str(candidate),
        "judged_files": sorted(files.judged),
        "base": str(base),
        **({"layout": dict(layout)} if layout else {}),
        **request.settings,
        "adapters": adapter_records(loaded, request.weights or (1.0,) * len(loaded)),
        "spellings": {adapter.name: one for adapter, one in zip(loaded, steps.spellings, strict=True)},
        "lora_export": __version__,
        "numpy": np.__version__,
    }
    return replace(audit, recorded=recorded, about=about)


def _contained(candidate: Path) -> str:
    """Which adapters the candidate records, as the end of a message; empty where it records none."""
    if not candidate.exists():
        return ""
    names = ", ".join(f"`{adapter.get('name')}`" for adapter in open_artifact(candidate).record.adapters)
    return f". {candidate} contains {names}" if names else ""
