"""The command that takes merged adapters out again."""

from __future__ import annotations

from typing import Any

from lora_export.cli.arguments import cli_command, print_document, print_wrote
from lora_export.cli.progress import shown
from lora_export.errors import count
from lora_export.options.unmerge import UnmergeOptions


@cli_command(UnmergeOptions, "unmerge kept fr -o base-again --base-from kept.residual")
def unmerge_command(as_json: bool, **options: Any) -> None:
    """Make the base of a merge again, bit for bit, from MERGED, its ADAPTERs and a residual.

    `merge --keep-residual` writes the residual: what the merged weights and the adapters do not tell of the base. The
    hash of each file is compared with that of the base. PyTorch is not needed.
    """
    with shown() as on_progress:
        from lora_export.api.unmerge import unmerge

        result = unmerge(on_progress=on_progress, **options)
    if as_json:
        facts = {"bytes": result.bytes, "restored": result.restored, "files": result.files}
        print_document({"output": str(result.output), **facts})
    else:
        what = f"{count(result.restored, 'tensor')} restored; every file has the hash that it had in the base"
        print_wrote(result.output, f": {what}")
