"""Exercise 2: what goes wrong when the base is not frozen.

    python samples/unfrozen_base.py

Trains the same adapter twice on the same examples: with the base frozen, and without. Both are then
deployed as adapters are: somebody who has the original base gets the file with A, B and the head.
This file does not contain what training changed in the base.
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
from lora_export.formats import WriteOptions, peft
from lora_export.formats.peft_keys import WEIGHTS
from lora_export.lora import Adapter
from lora_export.training.evaluation import Score, evaluate
from lora_export.training.loop import fit

RANK = 8


@dataclass(frozen=True)
class Outcome:
    """One training, and its adapter on the original base."""

    trained: Score  # on held-out examples, right after training
    deployed: Score  # on the same examples, with the saved adapter on the original base
    difference: float  # the largest one between both, over all scores of all examples
    drift: float  # ‖W' - W‖ / ‖W‖, over all of the base
    file: int  # bytes, as saved
    needed: int  # bytes that the trained model needs


def run(*, frozen: bool) -> Outcome:
    base, examples, held_out = small_task.load()
    module, fresh = small_task.adapted(base, RANK)
    if not frozen:
        module.requires_grad_(True)  # the mistake, in one line
    fit(module, examples, small_task.SETTINGS)

    adapter, size = saved_and_loaded(layers.read_back(module, fresh))
    deployed = copy.deepcopy(base)
    le.attach(deployed, le.make_plan([adapter], le.module_specs(deployed)))
    scores = evaluate(module, held_out), evaluate(deployed, held_out)
    with torch.no_grad():
        difference = float((module(**held_out.inputs) - deployed(**held_out.inputs)).abs().max())

    le.detach(module)  # leaves the base as it is after training
    before, after = weights(base), weights(module)
    drift = float((after - before).norm() / before.norm())
    return Outcome(*scores, difference, drift, size, size + (after.nbytes if drift else 0))


def saved_and_loaded(adapter: Adapter) -> tuple[Adapter, int]:
    """Save the adapter in PEFT's format and load it. Returns it with the size of the file in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        peft.write(adapter, Path(folder), WriteOptions())
        return le.load_adapter(folder), Path(folder, WEIGHTS).stat().st_size


def weights(module: nn.Module) -> torch.Tensor:
    """All weights of the base as one vector, without the head, which is in the adapter's file."""
    return torch.cat([tensor.flatten() for name, tensor in module.state_dict().items() if not name.startswith("head.")])


def main() -> tuple[Outcome, Outcome]:
    frozen, unfrozen = outcomes = run(frozen=True), run(frozen=False)
    table = Table("", "base frozen", "base not frozen")
    for title, text in (
        ("held out, right after training", lambda o: f"{o.trained.accuracy:.1%}, loss {o.trained.loss:.2f}"),
        ("held out, adapter on the original base", lambda o: f"{o.deployed.accuracy:.1%}, loss {o.deployed.loss:.2f}"),
        ("largest difference of a score", lambda o: f"{o.difference:.3g}"),
        ("the base's drift, ‖W' - W‖ / ‖W‖", lambda o: f"{100 * o.drift:.3g} %"),
        ("the adapter's file", lambda o: f"{o.file / 1e6:.2f} MB"),
        ("a file with the whole trained model", lambda o: f"{o.needed / 1e6:.2f} MB"),
    ):
        table.add_row(title, text(frozen), text(unfrozen))
    Console(highlight=False).print(table)
    return outcomes


if __name__ == "__main__":
    main()
