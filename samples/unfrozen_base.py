"""Exercise 2: what goes wrong when the base is not frozen.

    python samples/unfrozen_base.py

Trains the same adapter twice on the same examples, once with the base frozen and once without, and
deploys both as adapters are deployed: the file with A, B and the head goes to somebody who has the
original base. What training did to the base itself is not in that file.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lora_export as le
import small_task
from lora_export import layers
from lora_export.formats import peft
from lora_export.lora import Adapter
from lora_export.training.evaluation import Score, evaluate
from lora_export.training.loop import fit

RANK = 8


@dataclass(frozen=True)
class Outcome:
    """What came of one training, and of its adapter on the original base."""

    trained: Score
    deployed: Score
    difference: float  # the largest, of any score of a held-out example
    drift: float  # ‖W' - W‖ / ‖W‖, over all of the base
    file: int  # bytes, as saved
    needed: int  # bytes that would give the trained model back


def run(*, frozen: bool) -> Outcome:
    base, kept, held = small_task.load()
    module, fresh = small_task.adapted(base, RANK)
    if not frozen:
        module.requires_grad_(True)  # the mistake, in one line
    fit(module, kept, **small_task.SETTINGS)

    adapter, size = saved_and_loaded(layers.read_back(module, fresh))
    deployed = copy.deepcopy(base)
    le.attach(deployed, le.make_plan([adapter], le.module_specs(deployed)))
    scores = evaluate(module, held), evaluate(deployed, held)
    with torch.no_grad():
        difference = float((module(**held.inputs) - deployed(**held.inputs)).abs().max())

    le.detach(module)  # leaves the base, as it is after training
    before, after = weights(base), weights(module)
    drift = float((after - before).norm() / before.norm())
    return Outcome(*scores, difference, drift, size, size + (after.nbytes if drift else 0))


def saved_and_loaded(adapter: Adapter) -> tuple[Adapter, int]:
    """The adapter, through a file as PEFT would write it; and the file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        peft.write(adapter, Path(folder), rank=RANK, alpha=2 * RANK, targets=adapter.targets)
        return le.load_adapter(folder), Path(folder, peft.WEIGHTS).stat().st_size


def weights(module: nn.Module) -> torch.Tensor:
    """All weights of the base, as one vector. The head is in the adapter's file."""
    return torch.cat([tensor.flatten() for name, tensor in module.state_dict().items() if not name.startswith("head.")])


def main() -> tuple[Outcome, Outcome]:
    frozen, unfrozen = outcomes = run(frozen=True), run(frozen=False)
    table = Table("", "base frozen", "base not frozen")
    for title, told in (
        ("held out, as trained", lambda o: f"{o.trained.accuracy:.1%}, loss {o.trained.loss:.2f}"),
        ("held out, adapter on the original base", lambda o: f"{o.deployed.accuracy:.1%}, loss {o.deployed.loss:.2f}"),
        ("largest difference of a score", lambda o: f"{o.difference:.3g}"),
        ("the base's drift, ‖W' - W‖ / ‖W‖", lambda o: f"{100 * o.drift:.3g} %"),
        ("the adapter's file", lambda o: f"{o.file / 1e6:.2f} MB"),
        ("a file that would be enough", lambda o: f"{o.needed / 1e6:.2f} MB"),
    ):
        table.add_row(title, told(frozen), told(unfrozen))
    Console(highlight=False).print(table)
    return outcomes


if __name__ == "__main__":
    main()
