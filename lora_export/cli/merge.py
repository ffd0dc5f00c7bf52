"""`lora-export merge`: adapters into a checkpoint's weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lora_export.cli.arguments import adapter_weights, json_option, overwrite_option, say


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the merged weights go.")
@adapter_weights
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Store every float tensor as this type.",
)
@click.option(
    "--min-retention",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Refuse when rounding leaves a weight less than this share of its change.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done to which weight, and stop.")
@overwrite_option
@json_option
def command(
    base: Path,
    adapters: tuple[Path, ...],
    output: Path,
    weights: tuple[float, ...],
    dtype: str,
    min_retention: float,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge ADAPTERS into the checkpoint BASE: W' = W + Σ weight·scale·B·A, rounded once.

    BASE is a Hugging Face folder or a .safetensors file; the output is of the same kind, with the
    same layout. Needs no PyTorch, and memory does not grow with the model.
    """
    from lora_export import files, formats, plan, report
    from lora_export.checkpoint import open_checkpoint
    from lora_export.cli.progress import byte_progress
    from lora_export.merge import merge_checkpoint

    loaded = [formats.load(path) for path in adapters]
    checkpoint = open_checkpoint(base)
    steps = plan.make(loaded, checkpoint.specs, strengths=weights, may_add=True)
    for note in [*(note for adapter in loaded for note in adapter.notes), *steps.notes]:
        say(f"note: {note}")
    for name in checkpoint.left_out():
        say(f"note: {name} holds weights too, unmerged ones; it is left out")
    if dry_run:
        click.echo(json.dumps(report.as_dict(steps)) if as_json else str(steps))
        return
    stage = files.stage_folder if checkpoint.is_folder else files.stage_file
    inputs = [base, *adapters]
    with (
        stage(output, inputs=inputs, overwrite=overwrite, needs=checkpoint.nbytes, say=say) as folder,
        byte_progress("merging", checkpoint.nbytes) as progress,
    ):
        ledger = merge_checkpoint(
            steps,
            checkpoint,
            folder,
            file_name=output.name,
            dtype=None if dtype == "keep" else dtype,
            min_retention=min_retention,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps({"output": str(output), **report.as_dict(ledger)}))
    else:
        report.print_ledger(report.console(), ledger, output)
