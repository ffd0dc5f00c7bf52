"""`lora-export train`: make an adapter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lora_export.cli import help_sections
from lora_export.cli.arguments import (
    Command,
    command_line,
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
    "adapter": "held-out examples, with the adapter",
    "adapter_off": "held-out examples, same head, adapter disabled",
}

WIDEST_TABLE = 200  # characters

# As in training.row_forms, which would load NumPy
TASK_NAMES = (
    *("chat", "completion", "tags", "similarity"),
    *("image-classification", "automatic-speech-recognition", "classification", "language-modelling"),
)


class Choices(click.ParamType[tuple[str, ...]]):
    """Words out of a list, separated by commas."""

    name = "words"

    def __init__(self, *known: str):
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The words as a tuple, each once."""
        words = tuple(value.split(",") if value else ()) if isinstance(value, str) else tuple(value)
        if unknown := [word for word in words if word not in self.known]:
            self.fail(f"{', '.join(unknown)} is none of {', '.join(self.known)}", param, ctx)
        return tuple(dict.fromkeys(words))


def _read_columns(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=COLUMN... as a table."""
    columns: dict[str, str] = {}
    for text in texts:
        name, equals, column = text.partition("=")
        if not equals or not name or not column:
            raise click.BadParameter(f"{text} is not NAME=COLUMN, such as text=body")
        columns[name] = column
    return columns


def _read_patterns(_context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:
    """REGEX=NUMBER... as a table. The last equals sign counts."""
    patterns: dict[str, float] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            patterns[pattern] = int(number) if parameter.name == "rank_pattern" else float(number)
        except ValueError:
            raise click.BadParameter(f"{text} is not {parameter.metavar}, such as q_proj=4") from None
        if not pattern:
            raise click.BadParameter(f"{text} has no pattern before the equals sign")
    return patterns


EXAMPLE = """\b
Example:
  lora-export train base --data texts.jsonl -o adapter --rank 8 --target query,value"""


@click.command(cls=Command, epilog=EXAMPLE, sections=help_sections.OF_TRAIN)
@click.argument("model", type=Source())
@click.option(
    "--data",
    "data",
    required=True,
    type=Source(),
    help="Training data: a .jsonl, .csv, .parquet or .npz file, a folder, or file.py:factory.",
)
@click.option("-o", "--output", required=True, type=FilePath(), help="Folder for the adapter.")
@click.option(
    "--column",
    "columns",
    multiple=True,
    callback=_read_columns,
    metavar="NAME=COLUMN",
    help="Column of the data that is read as NAME, such as text=body. May be repeated.",
)
@click.option(
    "--task",
    type=click.Choice(TASK_NAMES),
    help="What is learnt from the columns, where they would fit several tasks.",
)
@click.option(
    "--rank",
    "ranks",
    type=click.IntRange(min=1),
    multiple=True,
    show_default="8",
    help="Rank: rows of A and columns of B. Repeated, each rank gets an adapter, and a table compares them.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(min=0, min_open=True),
    show_default="twice the rank",
    help="B·A is multiplied by alpha/rank.",
)
@click.option("--rslora", is_flag=True, help="Multiply by alpha/√rank instead.")
@click.option("--dora", is_flag=True, help="Also train the length of each output of a weight.")
@click.option(
    "--init",
    type=click.Choice(["default", "pissa", "olora"]),
    default="default",
    show_default=True,
    help="First values of A and B: random and zero, or from the weights. Then the saved rank is twice --rank.",
)
@click.option(
    "--target",
    show_default="all-linear",
    metavar="NAMES|all-linear",
    help="Layers to adapt: endings of their names, separated by commas.",
)
@click.option("--target-pattern", default="", metavar="REGEX", help="Regular expression for whole names of layers.")
@click.option(
    "--target-parameter",
    "target_parameters",
    multiple=True,
    metavar="NAME",
    help="Stacked parameter of experts, each of which gets a pair. May be repeated.",
)
@click.option(
    "--rank-pattern",
    multiple=True,
    callback=_read_patterns,
    metavar="REGEX=RANK",
    help="Another rank for layers whose names end so. The first match counts. May be repeated.",
)
@click.option(
    "--alpha-pattern",
    multiple=True,
    callback=_read_patterns,
    metavar="REGEX=ALPHA",
    help="Another alpha for layers whose names end so. May be repeated.",
)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    show_default="0",
    help="Part of the inputs of A that is dropped in a step.",
)
@click.option(
    "--bias",
    type=click.Choice(["none", "all", "lora_only"]),
    default="none",
    show_default=True,
    help="Biases to train: all, or those of the adapted layers.",
)
@click.option(
    "--token-index",
    "token_indices",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="N",
    help="Row of the input embeddings to train alone. May be repeated.",
)
@click.option(
    "--head", "heads", multiple=True, metavar="NAME", help="Module to train and save as a whole. May be repeated."
)
@click.option(
    "--continue-from",
    type=Source(),
    metavar="ADAPTER",
    help="Train this adapter further, with a new optimiser. Its layers, ranks and scales stay.",
)
@click.option(
    "--quantize-base",
    type=click.Choice(["nf4"]),
    help="Store the frozen linear layers of the base in 4 bits while training (QLoRA). Needs bitsandbytes.",
)
@click.option(
    "--base-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Dtype of the frozen weights while training. A half precision needs the same --precision.",
)
@click.option(
    "--shard-base",
    is_flag=True,
    help="With several processes: each holds a share of the frozen weights alone (FSDP).",
)
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True, help="Passes over the data.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Examples per step.")
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Parts of a step's examples that are computed one after the other.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Peak step size of AdamW.",
)
@click.option(
    "--b-ratio",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Learning rate of B divided by that of A (LoRA+).",
)
@click.option(
    "--schedule",
    type=click.Choice(["linear", "cosine", "constant"]),
    default="linear",
    show_default=True,
    help="Learning rate after the warm-up.",
)
@click.option(
    "--warmup",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Part of all steps in which the learning rate rises.",
)
@click.option(
    "--weight-decay", type=click.FloatRange(min=0), default=0.01, show_default=True, help="Weight decay of AdamW."
)
@click.option(
    "--max-gradient-norm",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Norm to which gradients are clipped.",
)
@click.option(
    "--precision",
    type=click.Choice(["no", "bf16", "fp16"]),
    default="no",
    show_default=True,
    help="Precision of autocast.",
)
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    help="Compute activations again in the backward pass: less memory, more time.",
)
@click.option("--compile", is_flag=True, help="Compute the steps with torch.compile. The first step takes long.")
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Maximum number of tokens per text.",
)
@click.option("--packing", is_flag=True, help="Put several short texts into one row. For causal language models.")
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Part of the data that is held out of training and measured on.",
)
@click.option(
    "--evaluate-every",
    type=click.IntRange(min=0),
    default=0,
    metavar="STEPS",
    help="Measure on the held-out data every so many steps.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Stop after N evaluations without a lower held-out loss, and keep the best adapter.",
)
@click.option("--keep-best", is_flag=True, help="Save the adapter of the lowest held-out loss, not the last one.")
@click.option(
    "--save-every",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="STEPS",
    help="Write a checkpoint to OUTPUT.training every so many steps.",
)
@click.option(
    "--tensorboard",
    type=FilePath(),
    metavar="FOLDER",
    help="Also write the metrics of each run to a folder there, for TensorBoard.",
)
@click.option("--resume", is_flag=True, help="Continue from the checkpoint of an interrupted training.")
@click.option(
    "--compare",
    type=Choices("full", "frozen"),
    default="",
    metavar="full,frozen",
    help="Also train all weights, or the head alone on the frozen base, and write a table.",
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
def command(model: str, data: str, output: Path, ranks: tuple[int, ...], as_json: bool, **settings: Any) -> None:
    """Train a LoRA adapter for MODEL and save it in PEFT's format.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. The columns of the data decide what
    is learnt: `text` alone continues texts, `text` and `label` classify them (`lora-export guide training`). An .npz
    has the model's inputs and `labels` (integers for classes, floats for regression).
    """
    from lora_export.api.train import train

    one_or_more = ranks[0] if len(ranks) == 1 else ranks or None
    try:
        with shown() as on_progress:
            result = train(
                model, data, output, rank=one_or_more, on_message=print_message, on_progress=on_progress, **settings
            )
    except KeyboardInterrupt:
        from lora_export.training.checkpoint import checkpoint_folder
        from lora_export.training.processes import rank, world_size

        if checkpoint_folder(output).exists() and rank() == 0:
            words = [word for word in command_line() if word not in ("--resume", "--overwrite")]
            if world_size() == 1:
                print_message(f"to continue: {shlex.join([*words, '--resume'])}")
            else:  # what a launcher was given is unknown here
                print_message(f"to continue, launch as before: -m lora_export {shlex.join([*words[1:], '--resume'])}")
        raise
    from lora_export.training.processes import rank

    if rank() > 0:  # of several processes, one prints
        return
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
                "runs": [run.document for run in result.runs],
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
        where = output if len(result.adapters) == 1 else output / f"rank-{run.rank}"
        click.echo(f"wrote {one_line(str(where))} ({adapter.parameters:,} numbers)")


def print_comparison(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print the ways to train a model, one a row."""
    from rich.console import Console
    from rich.table import Column, Table

    from lora_export.report.comparison import TITLES, comparison_rows

    table = Table(*(Column(title, no_wrap=True) for title in TITLES), box=None, pad_edge=False)
    for cells in comparison_rows(runs):
        table.add_row(*cells)
    # Cells are not cut: a terminal may wrap the rows, a file has them whole.
    Console(highlight=False, width=WIDEST_TABLE).print(table)
