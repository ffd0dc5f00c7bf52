"""`lora-export unmerge`: the base of a merge again, bit for bit."""

from __future__ import annotations

from pathlib import Path

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
from lora_export.cli.reading import ALLOW_PICKLE
from lora_export.errors import one_line

EXAMPLE = """\b
Example:
  lora-export unmerge kept fr -o base-again --base-from kept.residual"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("merged", type=FilePath())
@click.argument("adapters", nargs=-1, type=Source(), metavar="[ADAPTER]...")
@click.option("-o", "--output", required=True, type=FilePath(), help="Folder or file for the base.")
@click.option(
    "--base-from",
    required=True,
    type=FilePath(),
    metavar="RESIDUAL",
    help="File that `merge --keep-residual` wrote.",
)
@ALLOW_PICKLE
@overwrite_option
@download_option
@json_option
def command(
    merged: Path,
    adapters: tuple[str, ...],
    output: Path,
    base_from: Path,
    allow_pickle: bool,
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Make the base of a merge again, bit for bit, from MERGED, its ADAPTERs and a residual.

    `merge --keep-residual` writes the residual: what the merged weights and the adapters do not tell of the base. The
    hash of each file is compared with that of the base. PyTorch is not needed.
    """
    with shown() as on_progress:
        from lora_export.api.unmerge import unmerge

        result = unmerge(
            merged,
            adapters,
            output,
            base_from=base_from,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            download=download,
            on_message=print_message,
            on_progress=on_progress,
        )
    if as_json:
        facts = {"bytes": result.bytes, "restored": result.restored, "files": result.files}
        print_document({"output": str(result.output), **facts})
    else:
        what = f"{result.restored} tensors restored; every file has the hash that it had in the base"
        click.echo(f"wrote {one_line(str(result.output))}: {what}")
