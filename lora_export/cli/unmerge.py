"""`lora-export unmerge`: the base of a merge again, bit for bit."""

from __future__ import annotations

from typing import Any

import click

from lora_export.cli.arguments import Command, json_option, print_document, print_message
from lora_export.cli.parameters import takes_options
from lora_export.cli.progress import shown
from lora_export.errors import one_line
from lora_export.options.merge import UnmergeOptions

EXAMPLE = """\b
Example:
  lora-export unmerge kept fr -o base-again --base-from kept.residual"""


@click.command(cls=Command, epilog=EXAMPLE)
@takes_options(UnmergeOptions)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Make the base of a merge again, bit for bit, from MERGED, its ADAPTERs and a residual.

    `merge --keep-residual` writes the residual: what the merged weights and the adapters do not tell of the base. The
    hash of each file is compared with that of the base. PyTorch is not needed.
    """
    with shown() as on_progress:
        from lora_export.api.unmerge import unmerge

        result = unmerge(on_message=print_message, on_progress=on_progress, **options)
    if as_json:
        facts = {"bytes": result.bytes, "restored": result.restored, "files": result.files}
        print_document({"output": str(result.output), **facts})
    else:
        what = f"{result.restored} tensors restored; every file has the hash that it had in the base"
        click.echo(f"wrote {one_line(str(result.output))}: {what}")
