"""What a training measured, step by step, and the file of its metrics."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One step."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # the mean of what counted in the step, before it
    learning_rate: float
    tokens: int  # of the inputs; examples, where they are no tokens
    seconds: float


@dataclass(frozen=True)
class EvaluationRecord:
    """One measurement on held-out examples."""

    step: int  # after which it was made
    held_out_loss: float
    held_out_accuracy: float | None


@dataclass(frozen=True)
class MemoryUse:
    """The memory of a training, in bytes."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int
    activations: int  # what the forward pass of one part of a step keeps for the backward pass, without weights
    peak: int  # on CUDA of all tensors; on the CPU of the process, measured between forward and backward

    @property
    def total(self) -> int:
        """Weights, gradients, the state of the optimiser and activations together."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass
class TrainingHistory:
    """All steps and evaluations."""

    device: str
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    memory: MemoryUse = MemoryUse(0, 0, 0, 0, 0)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(step.loss for step in self.steps)

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(step.seconds for step in self.steps)

    @property
    def best(self) -> EvaluationRecord | None:
        """The evaluation with the lowest held-out loss, the first of equal ones."""
        return min(self.evaluations, key=lambda record: record.held_out_loss, default=None)

    @property
    def latest(self) -> list[StepRecord | EvaluationRecord]:
        """The last step, and the evaluation after it where there is one."""
        step = self.steps[-1]
        return [step, *(record for record in self.evaluations[-1:] if record.step == step.step)]

    def without_improvement(self) -> int:
        """How many evaluations have followed the best one."""
        return len(self.evaluations) - 1 - self.evaluations.index(self.best) if self.best else 0

    def __str__(self) -> str:
        taken = sum(self.seconds)
        return (
            f"{len(self.steps):,} {'step' if len(self.steps) == 1 else 'steps'} on {self.device} in {taken:.1f} s, "
            f"loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}, peak memory {self.memory.peak / 2**20:,.0f} MiB"
        )

    def as_table(self) -> dict[str, Any]:
        """Steps and evaluations as lists, for a checkpoint."""
        return {
            "steps": [list(asdict(step).values()) for step in self.steps],
            "evaluations": [list(asdict(record).values()) for record in self.evaluations],
        }

    def restore(self, table: dict[str, Any]) -> None:
        """Take over what `as_table` returned."""
        self.steps = [StepRecord(*values) for values in table["steps"]]
        self.evaluations = [EvaluationRecord(*values) for values in table["evaluations"]]

    def write(self, path: Path) -> None:
        """Write all records as lines of JSON, by step."""
        records: list[StepRecord | EvaluationRecord] = [*self.steps, *self.evaluations]
        records.sort(key=lambda record: record.step)
        path.write_text("".join(map(json_line, records)), encoding="utf-8", newline="\n")


def json_line(record: StepRecord | EvaluationRecord) -> str:
    """A record as one line of JSON."""
    return json.dumps(asdict(record), allow_nan=False) + "\n"
