"""`lora-export train`: make an adapter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import click

from lora_export.cli.arguments import cli_command, command_line, print_document, print_message, print_wrote
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.options.train import TrainOptions

# Score in the result -> what it was measured on
MEASURED = {
    "adapter": "held-out examples, with the adapter",
    "adapter_off": "held-out examples, same head, adapter disabled",
}

WIDEST_TABLE = 200  # characters


@cli_command(TrainOptions, "train base --data texts.jsonl -o adapter --rank 8 --target query,value")
def train_command(as_json: bool, **options: Any) -> None:
    """Train a LoRA adapter for MODEL and save it in PEFT's format.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. The columns of the data decide what
    is learnt: `text` alone continues texts, `text` and `label` classify them (`lora-export guide training`). An .npz
    has the model's inputs and `labels` (integers for classes, floats for regression).
    """
    from lora_export.api.train import train

    try:
        with shown() as on_progress:
            result = train(on_progress=on_progress, **options)
    except KeyboardInterrupt:
        from lora_export.training.checkpoint import checkpoint_folder
        from lora_export.training.processes import rank, world_size

        if checkpoint_folder(options["output"]).exists() and rank() == 0:
            words = [word for word in command_line() if word not in ("--resume", "--overwrite")]
            if world_size() == 1:
                print_message(f"to continue: {shlex.join([*words, '--resume'])}")
            else:  # what a launcher was given is unknown here
                print_message(f"to continue, launch as before: -m lora_export {shlex.join([*words[1:], '--resume'])}")
        raise
    from lora_export.report.json_document import plain
    from lora_export.training.processes import rank

    if rank() > 0:  # of several processes, one prints
        return
    if as_json:
        print_document(
            {
                "output": str(result.output),
                "sha256": result.adapter.sha256,
                "parameters": result.adapter.parameters,
                "steps": len(result.history.losses),
                "seconds": sum(result.history.seconds),
                "accuracy": {name: score.accuracy for name, score in result.scores.items()},
                "loss": plain({name: score.loss for name, score in result.scores.items()}),
                "runs": plain([run.document for run in result.runs]),
            }
        )
        return
    if verbosity() is not Verbosity.QUIET and len(result.runs) > 1:
        print_comparison([run.document for run in result.runs])
    elif verbosity() is not Verbosity.QUIET:
        for name, score in result.scores.items():
            what = MEASURED[name] if result.adapter.replaced else MEASURED[name].replace("same head, ", "")
            click.echo(f"{what}: {score}")
    for adapter, run in zip(result.adapters, result.runs, strict=False):
        where = result.output if len(result.adapters) == 1 else result.output / f"rank-{run.rank}"
        print_wrote(where, f" ({adapter.parameters:,} numbers)")


def print_comparison(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print the ways to train a model, one a row."""
    from rich.console import Console
    from rich.table import Column, Table

    from lora_export.report.training import TITLES, comparison_rows

    table = Table(*(Column(title, no_wrap=True) for title in TITLES), box=None, pad_edge=False)
    for cells in comparison_rows(runs):
        table.add_row(*cells)
    # Cells are not cut: a terminal may wrap the rows, a file has them whole.
    Console(highlight=False, width=WIDEST_TABLE).print(table)
