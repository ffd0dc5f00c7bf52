"""`lora-export train`: make an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from lora_export.cli.arguments import (
    Command,
    download_option,
    json_option,
    overwrite_option,
    print_document,
    print_message,
)
from lora_export.cli.paths import FilePath, Source
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.errors import one_line

# Score in the result -> what it was measured on
MEASURED = {
    "frozen": "held-out examples, head trained alone on the frozen base",
    "adapter": "held-out examples, with the adapter",
    "adapter_off": "held-out examples, same head, adapter disabled",
}

EXAMPLE = """\b
Example:
  lora-export train base --data texts.jsonl -o adapter --rank 8 --target query,value"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("model", type=Source())
@click.option(
    "--data",
    "data_path",
    required=True,
    type=FilePath(),
    help="Training data: a .jsonl, .csv or .npz file.",
)
@click.option("-o", "--output", required=True, type=FilePath(), help="Folder for the adapter.")
@click.option(
    "--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Rank: rows of A and columns of B."
)
@click.option(
    "--alpha",
    type=click.FloatRange(min=0, min_open=True),
    default=16.0,
    show_default=True,
    help="B·A is multiplied by alpha/rank.",
)
@click.option("--rslora", is_flag=True, help="Multiply by alpha/√rank instead.")
@click.option(
    "--target",
    default="all-linear",
    show_default=True,
    metavar="NAMES|all-linear",
    help="Layers to adapt: endings of their names, separated by commas.",
)
@click.option(
    "--head", "heads", multiple=True, metavar="NAME", help="Module to train and save as a whole. May be repeated."
)
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True, help="Passes over the data.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Examples per step.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Peak step size of AdamW.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Maximum number of tokens per text.",
)
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Part of the data that is held out of training and measured on.",
)
@click.option(
    "--compare-frozen", is_flag=True, help="Also train the head alone on the frozen base, and print both scores."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Random seed for the split, the initial values and the order.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device to train on."
)
@overwrite_option
@download_option
@json_option
def command(
    model: str,
    data_path: Path,
    output: Path,
    rank: int,
    alpha: float,
    rslora: bool,
    target: str,
    heads: tuple[str, ...],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    max_length: int,
    holdout: float,
    compare_frozen: bool,
    seed: int,
    device: Literal["cpu", "cuda"],
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Train a LoRA adapter for MODEL and save it in PEFT's format.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. A .jsonl or .csv file has the
    columns `text` and `label`: a classification head is added, and trained with the adapter. An .npz has the model's
    inputs and `labels` (integers for classes, floats for regression).
    """
    from lora_export.api.train import train

    with shown() as on_progress:
        result = train(
            model,
            data_path,
            output,
            rank=rank,
            alpha=alpha,
            rslora=rslora,
            target=target,
            heads=heads,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_length=max_length,
            holdout=holdout,
            compare_frozen=compare_frozen,
            seed=seed,
            device=device,
            overwrite=overwrite,
            download=download,
            on_message=print_message,
            on_progress=on_progress,
        )
    if as_json:
        print_document(
            {
                "output": str(output),
                "sha256": result.adapter.sha256,
                "parameters": result.adapter.parameters,
                "steps": len(result.history.losses),
                "seconds": sum(result.history.seconds),
                "accuracy": {name: score.accuracy for name, score in result.scores.items()},
                "loss": {name: score.loss for name, score in result.scores.items()},
            }
        )
        return
    for name, score in result.scores.items() if verbosity() is not Verbosity.QUIET else ():
        click.echo(f"{MEASURED[name]}: {score}")
    click.echo(f"wrote {one_line(str(output))} ({result.adapter.parameters:,} numbers)")
