"""The arguments of a merge, its result, and what merges into checkpoints, graphs and pipelines share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_export.api.load import load_adapters
from lora_export.callbacks import note_each
from lora_export.lora import Adapter
from lora_export.options.combining import AdapterSource, Combination
from lora_export.options.merge import MergeOptions
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.storage import atomic_output
from lora_export.weights.apply_step import Backend
from lora_export.weights.merge_report import MergeReport


def float32_remedy() -> str:
    """What helps where rounding takes too much of a checkpoint's change."""
    return f"{named('dtype', 'float32')} keeps it"


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
    share_with: Path | None = None
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

    def staged(self, size: int, *, is_file: bool = True, streamed: bool = True) -> AbstractContextManager[Path]:
        """The stage of the output, of so many bytes (see `atomic_output.staged`)."""
        inputs = [self.base, *self.sources, *([self.share_with] if self.share_with else [])]
        return atomic_output.staged(self, self.output, inputs, size, is_file=is_file, sign=self.sign, streamed=streamed)

    @contextlib.contextmanager
    def staged_residual(self) -> Iterator[Path | None]:
        """The file of the residual in a stage, where one is to be kept: refused before the merge, and not after it."""
        if self.keep_residual is None:
            yield None
            return
        inputs = [self.base, *self.sources]
        with atomic_output.staged(self, self.keep_residual, inputs, is_file=True) as folder:
            yield folder / self.keep_residual.name

    def report_notes(self, steps: Plan, more: Sequence[str]) -> tuple[str, ...]:
        """Show the notes on adapters, plan and base, and return them."""
        in_plan = () if self.dry_run else steps.notes  # a printed plan contains its notes
        notes = (*(note for adapter in self.adapters for note in adapter.notes), *in_plan, *more)
        note_each(self.on_message, notes)
        return notes

    def warn_of_rounding(self, report: MergeReport, remedy: Callable[[], str]) -> None:
        """Warn where rounding took much of the change of some weights. `remedy` makes the end of the message."""
        if report.below_rounding:
            worst = min(report.below_rounding, key=lambda result: result.retention)
            self.on_message(
                f"warning: rounding took more than a tenth of the change of {len(report.below_rounding)} of "
                f"{len(report.results)} weights, most of {worst.weight} ({worst.retention:.0%} is left); {remedy()}"
            )


# --- its adapters ---


def combined_pairs(steps: Plan, combination: Combination, together: Sequence[str] = ()) -> Plan:
    """`combine_in_plan`, which is imported for the few merges that combine by another method than the exact sum."""
    if combination.is_exact:
        return steps
    from lora_export.adapters.combine import combine_in_plan

    return combine_in_plan(steps, combination, together)


def read_adapters(
    options: MergeOptions, sources: Sequence[AdapterSource], reading: ReadOptions, *, of_models: bool = True
) -> list[Adapter]:
    """The adapters of a merge, from sources that were located. Raises InputRefused as `load_adapters`."""
    loaded = load_adapters(sources, options.prefixes, reading=reading, of_models=of_models)
    if not options.only_head:
        return loaded
    from lora_export.api.shared_head import head_alone  # few merges are of a head

    return [head_alone(adapter) for adapter in loaded]
