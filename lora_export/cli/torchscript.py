"""`lora-export torchscript`: a model with its adapters into one TorchScript or .pt2 file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_export.cli import help_sections
from lora_export.cli.arguments import TakesAdapters, print_document, print_message, publishing_options, wrote
from lora_export.cli.paths import FilePath, Source
from lora_export.cli.progress import shown

EXAMPLE = """\b
Examples:
  lora-export torchscript base -a adapter -o model.pt
  lora-export torchscript base -a adapter -o model.pt2"""


@click.command(cls=TakesAdapters, epilog=EXAMPLE, sections=help_sections.OF_TORCHSCRIPT)
@click.argument("model", type=Source())
@click.option(
    "-o",
    "--output",
    required=True,
    type=FilePath(),
    metavar="OUT.pt|OUT.pt2",
    help="File to publish after its proof: TorchScript, or with .pt2 a program of torch.export with dynamic sizes.",
)
@publishing_options("merged", "nodes")
def command(
    model: str,
    output: Path,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    prefixes: dict[str, str],
    reading: dict[str, Any],
    combination: dict[str, Any],
    tied: str,
    mode: str,
    inputs_file: Path | None,
    no_verify: bool,
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Export MODEL with its adapters to TorchScript or a .pt2, prove the file, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. The extra file `lora_export.json` in
    the output has the names of the inputs.
    """
    from lora_export.adapters.combination import Combination
    from lora_export.api.torchscript import export_torchscript
    from lora_export.cli.verdicts import proof_document, show_proof
    from lora_export.formats.read_options import ReadOptions

    with shown() as on_progress:
        result = export_torchscript(
            model,
            output,
            adapters=adapters,
            weights=weights,
            prefixes=prefixes,
            reading=ReadOptions(**reading),
            combination=Combination(**combination),
            tied=tied,
            lora=mode,
            inputs=inputs_file,
            verify=not no_verify,
            overwrite=overwrite,
            download=download,
            on_message=print_message,
            on_progress=on_progress,
        )
    if as_json:
        print_document({"output": str(result.output), "proof": proof_document(result.proof)})
    else:
        show_proof(result.proof)
        wrote(result.output)
