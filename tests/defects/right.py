"""Right exports, none of which may be called anything but the same, and what PyTorch's error beside theirs is.

The sets that judge the verdict, and those that its constants were measured on, share neither models nor seeds.
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
    made = [Right(there, there.kind) for there in (Column(subject, mode) for mode in modes)]
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
    """How many times PyTorch's own error a right export's was: what k has to allow."""

    storage: str
    elements: int
    error: float
    tail: float


def measured(right: Right, seed: int) -> Iterator[Measured]:
    there = right.judged(seed)
    assert there.proof, there.verdict
    for figures in (found.figures for found in there.proof.verdict.comparisons if found.figures):
        gates = {gate.name: figures.ratio_limit * gate.value / gate.allowed for gate in figures.gates if gate.allowed}
        elements = int(np.prod(figures.shape))
        yield Measured(right.column.storage, elements, gates.get("error", 0.0), gates.get("tail", 0.0))


def table(found: Sequence[Measured]) -> str:
    """By storage, and by the sizes for which k differs."""
    few = parity.FEW_ELEMENTS
    sizes = {f"up to {few}": (0, few), f"{few + 1} to 500": (few + 1, 500), "more": (501, 10**9)}
    lines = [
        "| outputs of | stored in | compared | error, median | 99 % | largest | tail, median | 99 % | largest | k |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, (least, most) in sizes.items():
        for storage in ("float32", *LOW):
            mine = [there for there in found if there.storage == storage and least <= there.elements <= most]
            if not mine:
                continue
            cells = [
                f"{number:.2f}"
                for of in ([there.error for there in mine], [there.tail for there in mine])
                for number in (np.median(of), np.quantile(of, 0.99), max(of))
            ]
            k = parity.ratio_limit(most, "float32")
            lines.append(f"| {size} | {storage} | {len(mine)} | {' | '.join(cells)} | {k:g} |")
    return "\n".join(lines)
