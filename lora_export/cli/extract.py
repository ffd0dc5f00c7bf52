"""`lora-export extract`: the adapter that turns a base into a model that was trained from it."""

from __future__ import annotations

from pathlib import Path

import click

from lora_export.cli.arguments import (
    Command,
    download_option,
    json_option,
    layout_option,
    overwrite_option,
    print_document,
    print_message,
    truncation_options,
)
from lora_export.cli.paths import FilePath
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import Verbosity, verbosity

EXAMPLE = """\b
Example:
  lora-export extract base tuned -o adapter --rank 16"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("base", type=FilePath())
@click.argument("tuned", type=FilePath())
@click.option("-o", "--output", required=True, type=FilePath(), help="Folder for the adapter.")
@truncation_options
@click.option(
    "--exclude",
    multiple=True,
    metavar="NAME",
    help="Tensor, module or glob whose difference is left out. May be repeated.",
)
@layout_option
@overwrite_option
@download_option
@json_option
def command(
    base: Path,
    tuned: Path,
    output: Path,
    rank: int | None,
    energy: float | None,
    exclude: tuple[str, ...],
    layout: dict[str, str],
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Write the adapter of what TUNED changed in BASE: a pair for each matrix, by an SVD of the difference.

    Both are Hugging Face folders or .safetensors files. Norms and biases that differ are saved whole. What an adapter
    cannot hold is refused by name. PyTorch is not needed, and memory does not grow with the size of the model.
    """
    with shown() as on_progress:
        from lora_export.api.extract import extract
        from lora_export.report.adapter_screen import print_shares
        from lora_export.report.console import console
        from lora_export.report.json_document import as_dict

        result = extract(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            layout=layout,
            exclude=exclude,
            overwrite=overwrite,
            download=download,
            on_message=print_message,
            on_progress=on_progress,
        )
    if as_json:
        print_document(as_dict(result))
        return
    print_shares(console(), output, result.layers, result.whole, whole=verbosity() is Verbosity.FULL)
