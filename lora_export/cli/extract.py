"""`lora-export extract`: the adapter that turns a base into a model that was trained from it."""

from __future__ import annotations

from typing import Any

import click

from lora_export.cli.arguments import Command, json_option, print_document, print_message
from lora_export.cli.parameters import takes_options
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.options.adapters import ExtractOptions

EXAMPLE = """\b
Example:
  lora-export extract base tuned -o adapter --rank 16"""


@click.command(cls=Command, epilog=EXAMPLE)
@takes_options(ExtractOptions)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Write the adapter of what TUNED changed in BASE: a pair for each matrix, by an SVD of the difference.

    Both are Hugging Face folders or .safetensors files. Norms and biases that differ are saved whole. What an adapter
    cannot hold is refused by name. PyTorch is not needed, and memory does not grow with the size of the model.
    """
    with shown() as on_progress:
        from lora_export.api.adapters import extract
        from lora_export.report.adapter_screen import print_shares
        from lora_export.report.console import console
        from lora_export.report.json_document import as_dict

        result = extract(on_message=print_message, on_progress=on_progress, **options)
    if as_json:
        print_document(as_dict(result))
        return
    print_shares(console(), result.output, result.layers, result.whole, whole=verbosity() is Verbosity.FULL)
