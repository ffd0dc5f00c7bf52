"""`lora-export resize`: an adapter of a lower rank."""

from __future__ import annotations

from typing import Any

import click

from lora_export.cli.arguments import Command, json_option, print_document, print_message
from lora_export.cli.parameters import takes_options
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.options.adapters import ResizeOptions

EXAMPLE = """\b
Example:
  lora-export resize fr -o small --energy 0.95"""


@click.command(cls=Command, epilog=EXAMPLE)
@takes_options(ResizeOptions)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Write ADAPTER with a lower rank: the best pair of that rank for each layer, by an exact SVD.

    The share of each layer's change that is left is reported. The output is a PEFT adapter. No base and no PyTorch
    are needed.
    """
    from lora_export.api.adapters import resize
    from lora_export.report.adapter_screen import print_shares
    from lora_export.report.console import console
    from lora_export.report.json_document import as_dict

    result = resize(on_message=print_message, **options)
    if as_json:
        print_document(as_dict(result))
    else:
        print_shares(console(), result.output, result.layers, whole=verbosity() is Verbosity.FULL)
