"""`lora-export combine`: several adapters as one."""

from __future__ import annotations

from typing import Any

import click

from lora_export.cli.arguments import Command, json_option, print_document, print_message
from lora_export.cli.parameters import takes_options
from lora_export.errors import one_line
from lora_export.options.adapters import CombineOptions

EXAMPLE = """\b
Example:
  lora-export combine fr de -o both --weight 0.7 --weight 0.3"""


@click.command(cls=Command, epilog=EXAMPLE)
@takes_options(CombineOptions)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Combine adapters into one PEFT adapter, exactly or as PEFT's add_weighted_adapter does.

    The exact sum (cat) has the sum of all ranks; `lora-export resize` makes it smaller. No base and no PyTorch are
    needed. `lora-export merge --combine` merges the same combination.
    """
    from lora_export.api.adapters import combine

    result = combine(on_message=print_message, **options)
    if as_json:
        figures = {"modules": result.modules, "shared": result.shared, "largest_rank": result.largest_rank}
        print_document({"output": str(result.output), **figures, "notes": list(result.notes)})
    else:
        counts = f"{result.modules} pairs of rank {result.largest_rank} or less, {result.shared} from several adapters"
        click.echo(f"wrote {one_line(str(result.output))}: {counts}")
