"""`lora-export resize`: an adapter of a lower rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_export.cli.arguments import (
    Command,
    download_option,
    json_option,
    overwrite_option,
    print_document,
    print_message,
    truncation_options,
)
from lora_export.cli.paths import FilePath, Source
from lora_export.cli.reading import reading_options
from lora_export.cli.verbosity import Verbosity, verbosity

EXAMPLE = """\b
Example:
  lora-export resize fr -o small --energy 0.95"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("adapter", type=Source(), metavar="ADAPTER")
@click.option("-o", "--output", required=True, type=FilePath(), help="Folder for the smaller adapter.")
@truncation_options
@reading_options
@overwrite_option
@download_option
@json_option
def command(
    adapter: str,
    output: Path,
    rank: int | None,
    energy: float | None,
    reading: dict[str, Any],
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER with a lower rank: the best pair of that rank for each layer, by an exact SVD.

    The share of each layer's change that is left is reported. The output is a PEFT adapter. No base and no PyTorch
    are needed.
    """
    from lora_export.api.resize import resize
    from lora_export.formats.read_options import ReadOptions
    from lora_export.report.adapter_screen import print_shares
    from lora_export.report.console import console
    from lora_export.report.json_document import as_dict

    result = resize(
        adapter,
        output,
        rank=rank,
        energy=energy,
        reading=ReadOptions(**reading),
        overwrite=overwrite,
        download=download,
        on_message=print_message,
    )
    if as_json:
        print_document(as_dict(result))
    else:
        print_shares(console(), output, result.layers, whole=verbosity() is Verbosity.FULL)
