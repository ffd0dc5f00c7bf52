"""`lora-export torchscript`: a model with its adapters into one TorchScript or .pt2 file."""

from __future__ import annotations

from typing import Any

import click

from lora_export.cli.arguments import TakesAdapters, json_option, print_document, print_message, wrote
from lora_export.cli.parameters import takes_options
from lora_export.cli.progress import shown
from lora_export.options.export import TorchScriptOptions

EXAMPLE = """\b
Examples:
  lora-export torchscript base -a adapter -o model.pt
  lora-export torchscript base -a adapter -o model.pt2"""


@click.command(cls=TakesAdapters, epilog=EXAMPLE)
@takes_options(TorchScriptOptions)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Export MODEL with its adapters to TorchScript or a .pt2, prove the file, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. The extra file `lora_export.json` in
    the output has the names of the inputs.
    """
    from lora_export.api.torchscript import export_torchscript
    from lora_export.cli.verdicts import proof_document, show_proof

    with shown() as on_progress:
        result = export_torchscript(on_message=print_message, on_progress=on_progress, **options)
    if as_json:
        print_document({"output": str(result.output), "proof": proof_document(result.proof)})
    else:
        show_proof(result.proof)
        wrote(result.output)
