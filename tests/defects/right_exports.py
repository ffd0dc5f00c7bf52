"""Right exports: the verdict on each must be `same`. Their errors, relative to PyTorch's, calibrate the limits.

The exports that test the verdict share neither models nor seeds with those on which its limits were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from defects import judging, subjects
from defects.subjects import Column
from lora_export.verification import parity


@dataclass(frozen=True)
class Right:
    column: Column
    kind: str

    def __str__(self) -> str:
        return f"{self.column}, {self.kind}"

    def judged(self, seed: int) -> judging.Judged:
        adapter = subjects.adapter(self.column.subject, self.kind, seed=seed)
        return judging.judged(self.column.candidate(adapter), self.column, adapter, seed=1000 * seed)


def _rights(
    subject: str, modes: Sequence[str], *, storages: Sequence[str] = (), dora: Sequence[str] = ()
) -> list[Right]:
    made = [Right(column, column.kind) for column in (Column(subject, mode) for mode in modes)]
    made += [Right(Column(subject, "checkpoint", storage), "whole") for storage in storages]
    return [*made, *(Right(Column(subject, mode), "dora") for mode in dora)]


LOW = ("bfloat16", "float16")
JUDGING = [
    *_rights("net", subjects.MODES, storages=LOW, dora=("merged", "nodes", "checkpoint")),
    *_rights("bert", subjects.MODES, storages=LOW, dora=("merged",)),
    *_rights("llama", subjects.MODES, storages=LOW, dora=("nodes",)),
    *_rights("gpt2", subjects.MODES, storages=LOW, dora=("checkpoint",)),
    *_rights("minilm", ("checkpoint",), storages=("bfloat16",)),
    *_rights("trainednet", ("merged", "nodes", "checkpoint"), storages=("bfloat16",)),
    *_rights("deepnet", ("merged", "checkpoint")),
    *_rights("deepllama", ("checkpoint",), storages=("bfloat16",)),
]
JUDGING_SEEDS = range(1, 6)
CALIBRATING = [
    *_rights("cnn", ("merged", "nodes", "checkpoint", "torchscript"), storages=LOW),
    *_rights("roberta", ("merged", "checkpoint"), storages=LOW, dora=("merged",)),
    *_rights("qwen2", ("merged", "nodes", "checkpoint"), storages=LOW),
    *_rights("opt", ("checkpoint", "torchscript"), storages=LOW),
    *_rights("distilbert", ("merged", "nodes", "checkpoint"), storages=LOW),
    *_rights("deepbert", ("checkpoint", "torchscript"), storages=LOW),
]
CALIBRATING_SEEDS = range(101, 106)


@dataclass(frozen=True)
class Measured:
    """The errors of a right export as multiples of PyTorch's own: what the ratio limit must allow."""

    export: str  # with its adapter's seed, the output and the case
    storage: str
    elements: int
    error: float
    tail: float

    @property
    def largest(self) -> float:
        return max(self.error, self.tail)


def measured(right: Right, seed: int) -> Iterator[Measured]:
    result = right.judged(seed)
    assert result.proof, result.verdict
    for comparison, figures in result.proof.verdict.measured:
        gates = {gate.name: figures.ratio_limit * gate.value / gate.allowed for gate in figures.gates if gate.allowed}
        elements = int(np.prod(figures.shape))
        export = f"{right}, seed {seed}, {comparison.output} of {comparison.case}"
        yield Measured(export, right.column.storage, elements, gates.get("error", 0.0), gates.get("tail", 0.0))


def table(found: Sequence[Measured]) -> str:
    """A row for each storage dtype and each size that has a ratio limit of its own."""
    few = parity.gates.FEW_ELEMENTS
    sizes = {f"up to {few}": (0, few), f"{few + 1} to 500": (few + 1, 500), "more": (501, 10**9)}
    columns = ["outputs of", "stored in", "compared", "error, median", "99 %", "largest", "tail, median", "99 %"]
    columns += ["largest", "limit", "export that needs most"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for size, (least, most) in sizes.items():
        for storage in ("float32", *LOW):
            mine = [each for each in found if each.storage == storage and least <= each.elements <= most]
            if not mine:
                continue
            cells = [
                f"{number:.2f}"
                for of in ([each.error for each in mine], [each.tail for each in mine])
                for number in (np.median(of), np.quantile(of, 0.99), max(of))
            ]
            k = parity.ratio_limit(most, "float32")
            most_needed = max(mine, key=lambda each: each.largest).export
            lines.append(f"| {size} | {storage} | {len(mine)} | {' | '.join(cells)} | {k:g} | {most_needed} |")
    return "\n".join(lines)
