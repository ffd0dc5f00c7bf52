"""Exercise 3: rank 4 against rank 64 on a small data set.

    python samples/rank_4_or_64.py [OUT.png]

Trains both with the same examples, steps, learning rate, scale (alpha / rank = 2) and seed. Draws the
losses in training and on held-out examples, and prints what each rank costs. The peak memory of the
process is not printed: Python, PyTorch and the base take most of it, whatever the rank.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import lora_export as le
import small_task
from lora_export.training.checkpoint import StepRecord
from lora_export.training.evaluation import evaluate
from lora_export.training.loop import fit

LINES = {4: ("blue, solid", "-o", "#0072b2"), 64: ("orange, dashed", "--s", "#d55e00")}
IN_TRAINING = 4 * 4  # bytes for one parameter: itself, its gradient and Adam's two moments, in fp32


@dataclass(frozen=True)
class Run:
    """One training at one rank."""

    rank: int
    parameters: int  # trainable: A, B and the head
    seconds: float  # for one step; the median, since the last step of an epoch also evaluates
    training: list[float]  # the mean loss of each epoch's steps
    held_out: list[float]  # the loss before training, and after each epoch

    @property
    def megabytes(self) -> float:
        return IN_TRAINING * self.parameters / 1e6


def run(rank: int) -> Run:
    base, examples, held_out = small_task.load()
    module, _ = small_task.adapted(base, rank)
    losses = [evaluate(module, held_out).loss]
    epochs = small_task.SETTINGS.epochs

    def on_step(record: StepRecord, steps: int, _peak: int) -> None:
        if record.step % (steps // epochs) == 0:
            losses.append(evaluate(module, held_out).loss)

    history = fit(module, examples, small_task.SETTINGS, on_step=on_step)
    steps = len(history.losses) // epochs
    training = [statistics.fmean(history.losses[epoch * steps :][:steps]) for epoch in range(epochs)]
    return Run(rank, le.count_parameters(module).trained, statistics.median(history.seconds), training, losses)


def draw(runs: list[Run], path: Path) -> None:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    figure.suptitle(f"LoRA on MiniLM's last layer, {small_task.EXAMPLES} examples")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for run in runs:
        _, line, colour = LINES[run.rank]
        cost = f"{run.parameters:,} parameters, {run.megabytes:.1f} MB in training, {1e3 * run.seconds:.0f} ms a step"
        style = {"color": colour, "linewidth": 2, "markersize": 5, "clip_on": False}
        left.plot(range(1, len(run.training) + 1), run.training, line, label=f"rank {run.rank}: {cost}", **style)
        right.plot(run.held_out, line, **style)
    left.set(title="training (mean of an epoch)", xlabel="epoch", ylabel="cross-entropy (nats)", ylim=(0, None))
    right.set(title="held out (after an epoch)", xlabel="epoch")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=150)


def main(path: Path) -> list[Run]:
    runs = [run(rank) for rank in LINES]
    draw(runs, path)
    table = Table("rank", *(f"{run.rank} ({LINES[run.rank][0]})" for run in runs))
    for title, text in (
        ("trainable parameters", lambda r: f"{r.parameters:,}"),
        ("these, gradients, Adam's state", lambda r: f"{r.megabytes:.2f} MB"),
        ("a step on one core (median)", lambda r: f"{1e3 * r.seconds:.0f} ms"),
        ("training loss in the last epoch", lambda r: f"{r.training[-1]:.2f}"),
        ("held-out loss at the end", lambda r: f"{r.held_out[-1]:.2f}"),
        ("its lowest", lambda r: f"{min(r.held_out):.2f} after epoch {r.held_out.index(min(r.held_out))}"),
    ):
        table.add_row(title, *map(text, runs))
    Console(highlight=False).print(table, f"The curves are in {path}.", soft_wrap=True)
    return runs


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "rank_4_or_64.png"))
