"""`lora-export combine`: several adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_export.cli.application_options import combination_options
from lora_export.cli.arguments import (
    Command,
    adapter_weights,
    download_option,
    json_option,
    overwrite_option,
    prefix_option,
    print_document,
    print_message,
)
from lora_export.cli.paths import FilePath, Source
from lora_export.cli.reading import reading_options
from lora_export.errors import one_line

EXAMPLE = """\b
Example:
  lora-export combine fr de -o both --weight 0.7 --weight 0.3"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("adapters", nargs=-1, required=True, type=Source(), metavar="[NAME=]ADAPTER...")
@click.option("-o", "--output", required=True, type=FilePath(), help="Folder for the combined adapter.")
@adapter_weights
@combination_options("--method", "--combine")
@prefix_option
@reading_options
@overwrite_option
@download_option
@json_option
def command(
    adapters: tuple[str, ...],
    output: Path,
    weights: tuple[float, ...],
    combination: dict[str, Any],
    prefixes: dict[str, str],
    reading: dict[str, Any],
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Combine adapters into one PEFT adapter, exactly or as PEFT's add_weighted_adapter does.

    The exact sum (cat) has the sum of all ranks; `lora-export resize` makes it smaller. No base and no PyTorch are
    needed. `lora-export merge --combine` merges the same combination.
    """
    from lora_export.adapters.combination import Combination
    from lora_export.api.combine import combine
    from lora_export.formats.read_options import ReadOptions

    result = combine(
        adapters,
        output,
        combination=Combination(**combination),
        weights=weights,
        prefixes=prefixes,
        reading=ReadOptions(**reading),
        overwrite=overwrite,
        download=download,
        on_message=print_message,
    )
    if as_json:
        figures = {"modules": result.modules, "shared": result.shared, "largest_rank": result.largest_rank}
        print_document({"output": str(output), **figures, "notes": list(result.notes)})
    else:
        counts = f"{result.modules} pairs of rank {result.largest_rank} or less, {result.shared} from several adapters"
        click.echo(f"wrote {one_line(str(output))}: {counts}")
