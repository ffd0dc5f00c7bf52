"""`lora-export merge`: adapters into the weights of a checkpoint or a graph."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from lora_export.cli import help_sections, startup
from lora_export.cli.application_options import combination_options, tied_option
from lora_export.cli.arguments import (
    Command,
    adapter_weights,
    download_option,
    json_option,
    layout_option,
    overwrite_option,
    prefix_option,
    print_document,
    print_message,
)
from lora_export.cli.paths import FilePath, Source
from lora_export.cli.progress import shown
from lora_export.cli.reading import reading_options
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.errors import one_line

PLANNED = 5  # weights of the short screen of --dry-run

EXAMPLE = """\b
Example:
  lora-export merge base adapter -o merged"""


@click.command(cls=Command, epilog=EXAMPLE, sections=help_sections.OF_MERGE)
@click.argument("base", type=FilePath())
@click.argument("adapters", nargs=-1, type=Source(), metavar="[NAME=]ADAPTER...")
@click.option(
    "-a",
    "--adapter",
    "further",
    type=Source(),
    multiple=True,
    metavar="[NAME=]ADAPTER",
    help="Adapter to merge, in place of an argument. May be repeated.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=FilePath(),
    help="Folder or file for the merged weights: the same kind as BASE.",
)
@adapter_weights
@combination_options("--combine")
@prefix_option
@reading_options
@tied_option
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Type in which every float tensor is stored.",
)
@click.option(
    "--min-retention",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Least part of a weight's change that has to survive rounding. Less is refused.",
)
@click.option(
    "--hash",
    "hashing",
    type=click.Choice(["xxh3_128", "sha256"]),
    default="xxh3_128",
    show_default=True,
    help="Hash that identifies base and output. sha256 takes longer than the merge.",
)
@click.option(
    "--base",
    "checkpoint",
    type=FilePath(),
    metavar="CHECKPOINT",
    help="Checkpoint that an .onnx BASE was exported from. Names the weights whose names were lost, by content.",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Also merge into quantised weights of an .onnx BASE, and quantise the sum in the same scheme.",
)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Make a quantised BASE a float model, and merge into that. `lora-export guide merging` lists the schemes.",
)
@click.option(
    "--float-base",
    type=FilePath(),
    metavar="CHECKPOINT",
    help="Float checkpoint that a quantised BASE was made from. The report then has each weight's quantisation error.",
)
@click.option(
    "--variant",
    metavar="NAME",
    help="Weights to merge into, of a BASE folder with several sets: fp16 for model.fp16.safetensors, none for "
    "model.safetensors.",
)
@layout_option
@click.option(
    "--only-head",
    is_flag=True,
    help="Merge only the tensors that the adapters save whole: a task head, for models that share it.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Device for the arithmetic. cuda needs PyTorch, and was not measured to be faster.",
)
@click.option(
    "--keep-residual",
    type=FilePath(),
    metavar="FILE",
    help="Also write FILE: `unmerge` makes BASE again with it, the output and the adapters, bit for bit.",
)
@click.option("--dry-run", is_flag=True, help="Print which weights would change, and write nothing.")
@overwrite_option
@download_option
@json_option
def command(
    base: Path,
    adapters: tuple[str, ...],
    further: tuple[str, ...],
    output: Path,
    weights: tuple[float, ...],
    combination: dict[str, Any],
    prefixes: dict[str, str],
    reading: dict[str, Any],
    tied: str,
    dtype: str,
    min_retention: float,
    hashing: str,
    checkpoint: Path | None,
    requantize: bool,
    dequantize: bool,
    float_base: Path | None,
    variant: str | None,
    layout: dict[str, str],
    only_head: bool,
    device: str,
    keep_residual: Path | None,
    dry_run: bool,
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Merge adapters into the weights of BASE: W' = W + Σ weight·scale·B·A, rounded once.

    BASE is a Hugging Face folder, a .safetensors file or an .onnx file. The output is the same kind, with the same
    layout. PyTorch is not needed, and memory does not grow with the size of the model.
    """
    # A process that imports torch is not made faster by what `brisk` does.
    with startup.brisk() if device == "cpu" else contextlib.nullcontext(), shown() as on_progress:
        from lora_export.adapters.combination import Combination
        from lora_export.api.merge import merge
        from lora_export.formats.read_options import ReadOptions
        from lora_export.report.console import console
        from lora_export.report.merge_screen import print_merge_report, print_merge_summary, print_plan

        result = merge(
            base,
            _one_way(adapters, further),
            output,
            weights=weights,
            combination=Combination(**combination),
            prefixes=prefixes,
            reading=ReadOptions(**reading),
            tied=tied,
            dtype=dtype,
            min_retention=min_retention,
            hashing=hashing,
            checkpoint=checkpoint,
            requantize=requantize,
            dequantize=dequantize,
            float_base=float_base,
            variant=variant,
            layout=layout,
            only_head=only_head,
            device=device,
            keep_residual=keep_residual,
            dry_run=dry_run,
            overwrite=overwrite,
            download=download,
            on_message=print_message,
            on_progress=on_progress,
        )
    if as_json:
        from lora_export.report.json_document import as_dict  # which imports the verdicts

        facts: dict[str, Any] = {} if result.report is None else {"output": str(result.output)}
        if result.residual_bytes is not None:
            facts["residual"] = {"path": str(keep_residual), "bytes": result.residual_bytes}
        print_document(facts | as_dict(result.report or result.plan))
    elif result.report is None:
        most = {Verbosity.QUIET: 0, Verbosity.SHORT: PLANNED, Verbosity.FULL: None}[verbosity()]
        print_plan(console(), result.plan, most)
    elif verbosity() is Verbosity.QUIET:
        click.echo(f"wrote {one_line(str(result.output))}")
    elif verbosity() is Verbosity.FULL:
        print_merge_report(console(), result.report, result.output)
    else:
        print_merge_summary(console(), result.report, result.output)


def _one_way(arguments: tuple[str, ...], options: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters, which are given as arguments or by -a. Both together would leave the order of --weight open."""
    if arguments and options:
        raise click.UsageError("give the adapters as arguments or by -a, not in both ways")
    if not arguments and not options:
        raise click.UsageError("Missing argument '[NAME=]ADAPTER...'.")
    return arguments or options
