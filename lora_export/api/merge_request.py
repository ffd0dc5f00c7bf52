"""The arguments of a merge, its result, and what merges into checkpoints, graphs and pipelines share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_export.lora import Adapter
from lora_export.options.combining import AdapterSource
from lora_export.options.merge import MergeOptions
from lora_export.options.spelling import command, named
from lora_export.plan import Plan
from lora_export.storage import atomic_output
from lora_export.weights.apply_step import Backend
from lora_export.weights.calibrated_rounding import LayerInputs
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.merge import CheckpointMerge
from lora_export.weights.merge_report import MergeReport


def float32_remedy() -> str:
    """What helps where rounding takes too much of a checkpoint's change."""
    return f"{named('dtype', 'float32')} keeps it"


def nodes_remedy() -> str:
    """What helps where rounding takes too much of a graph's change."""
    return f"keep the adapter beside the weights ({command('onnx', 'MODEL.onnx', lora='nodes')})"


@dataclass(frozen=True)
class MergeResult:
    """What a merge did. `str()` of `plan` is the list of weights with the pairs that are added to each."""

    output: Path
    plan: Plan
    report: MergeReport | None  # None after a dry run: nothing was written
    notes: tuple[str, ...]  # what the caller should know: on the adapters, the plan and the base
    residual_bytes: int | None = None  # the size of the residual, where one was kept

    def _repr_html_(self) -> str:
        return (self.report or self.plan)._repr_html_()


@dataclass(frozen=True, kw_only=True)
class MergeRequest(MergeOptions):
    """The options of a merge, with everything found and loaded that they name."""

    base: Path = field(kw_only=False)
    adapters: Sequence[Adapter] = field(kw_only=False)
    output: Path = field(kw_only=False)
    sources: Sequence[Path]  # the paths of the adapters
    located: Sequence[AdapterSource]  # the same with their names, as they are read
    checkpoint: Path | None = None
    float_base: Path | None = None
    keep_residual: Path | None = None
    calibration: Path | None = None

    @property
    def strengths(self) -> Sequence[float]:
        """One factor for each adapter."""
        return self.weights or (1.0,) * len(self.adapters)

    @property
    def is_shared(self) -> bool:
        """Whether workers write the files of the output."""
        return self.jobs > 1 or self.ray is not None

    @property
    def stored(self) -> str | None:
        """The type in which floats are stored; None: each in its own."""
        return None if self.dtype == "keep" else self.dtype

    @property
    def plan_settings(self) -> dict[str, Any]:
        """What `unmerge` needs to make the same plan."""
        return {
            "layout": dict(self.layout or {}),
            "prefixes": dict(self.prefixes or {}),
            "reading": self.reading.recorded,
            "combination": asdict(self.combined),
            "tied": self.tied,
        }

    def backend(self) -> AbstractContextManager[Backend]:
        """Where weights are changed."""
        if self.device == "cpu":
            return contextlib.nullcontext(Backend())
        from lora_export.weights import cuda

        return cuda.cuda()

    def of_checkpoint(
        self,
        plan: Plan,
        base: Checkpoint,
        backend: Backend,
        settings: Mapping[str, Any],
        calibration: Mapping[str, LayerInputs] = MappingProxyType({}),
    ) -> CheckpointMerge:
        """The merge of a checkpoint as this request has it."""
        return CheckpointMerge(
            plan, base, self.stored, self.min_retention, self.hashing, backend, settings, calibration
        )

    def staged(self, size: int, *, is_file: bool = True, streamed: bool = True) -> AbstractContextManager[Path]:
        """The stage of the output, of so many bytes (see `atomic_output.staged`)."""
        inputs = [self.base, *self.sources]
        return atomic_output.staged(self, self.output, inputs, size, is_file=is_file, sign=self.sign, streamed=streamed)

    def report_notes(self, steps: Plan, more: Sequence[str]) -> tuple[str, ...]:
        """Show the notes on adapters, plan and base, and return them."""
        in_plan = () if self.dry_run else steps.notes  # a printed plan contains its notes
        notes = (*(note for adapter in self.adapters for note in adapter.notes), *in_plan, *more)
        for note in notes:
            self.on_message(f"note: {note}")
        return notes

    def warn_of_rounding(self, report: MergeReport, remedy: Callable[[], str]) -> None:
        """Warn where rounding took much of the change of some weights. `remedy` makes the end of the message."""
        if report.below_rounding:
            worst = min(report.below_rounding, key=lambda result: result.retention)
            self.on_message(
                f"warning: rounding took more than a tenth of the change of {len(report.below_rounding)} of "
                f"{len(report.results)} weights, most of {worst.weight} ({worst.retention:.0%} is left); {remedy()}"
            )
