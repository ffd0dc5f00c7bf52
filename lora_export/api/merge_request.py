"""The arguments of a merge, its result, and what merges into checkpoints, graphs and pipelines share."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.adapters.combination import Combination
from lora_export.api.callbacks import OnMessage, OnProgress
from lora_export.lora import Adapter
from lora_export.plan import Plan, Tied
from lora_export.weights.apply_step import Backend
from lora_export.weights.merge_report import MergeReport

FLOAT32 = "--dtype float32 keeps it"
NODES = "keep the adapter beside the weights (onnx MODEL.onnx --lora nodes)"


@dataclass(frozen=True)
class MergeResult:
    """What a merge did. `str()` of `plan` is the list of weights with the pairs that are added to each."""

    output: Path
    plan: Plan
    report: MergeReport | None  # None after a dry run: nothing was written
    notes: tuple[str, ...]  # what the caller should know: on the adapters, the plan and the base
    residual_bytes: int | None = None  # the size of the residual, where one was kept


@dataclass(frozen=True)
class MergeRequest:
    """The arguments of `merge` that are the same for a checkpoint, a graph and a pipeline."""

    base: Path
    adapters: Sequence[Adapter]
    sources: Sequence[Path]  # the paths of the adapters
    output: Path
    weights: Sequence[float]
    min_retention: float
    hashing: str
    device: str
    layout: Mapping[str, str]
    combination: Combination
    tied: Tied
    float_base: Path | None
    variant: str | None
    residual: Path | None
    plan_settings: Mapping[str, Any]  # what `unmerge` needs to make the same plan
    dry_run: bool
    overwrite: bool
    on_message: OnMessage = field(repr=False)
    on_progress: OnProgress = field(repr=False)

    def backend(self) -> AbstractContextManager[Backend | None]:
        """Where weights are changed; None for NumPy."""
        if self.device == "cpu":
            return contextlib.nullcontext()
        from lora_export.weights import cuda

        return cuda.cuda()

    def staged(self, stage: Any, size: int) -> AbstractContextManager[Path]:
        """The output on its way, by a function of `atomic_output`."""
        staged: AbstractContextManager[Path] = stage(
            self.output,
            inputs=[self.base, *self.sources],
            overwrite=self.overwrite,
            required_bytes=size,
            on_message=self.on_message,
        )
        return staged

    def report_notes(self, steps: Plan, more: Sequence[str]) -> tuple[str, ...]:
        """Show the notes on adapters, plan and base, and return them."""
        in_plan = () if self.dry_run else steps.notes  # a printed plan contains its notes
        notes = (*(note for adapter in self.adapters for note in adapter.notes), *in_plan, *more)
        for note in notes:
            self.on_message(f"note: {note}")
        return notes

    def warn_of_rounding(self, report: MergeReport, remedy: str) -> None:
        """Warn where rounding took much of the change of some weights."""
        if report.below_rounding:
            worst = min(report.below_rounding, key=lambda result: result.retention)
            self.on_message(
                f"warning: rounding took more than a tenth of the change of {len(report.below_rounding)} of "
                f"{len(report.results)} weights, most of {worst.weight} ({worst.retention:.0%} is left); {remedy}"
            )
