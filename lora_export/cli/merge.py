"""The command that merges adapters into weights."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from lora_export.cli import startup
from lora_export.cli.arguments import cli_command, print_document, print_wrote
from lora_export.cli.parameters import Source
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.options.merge import MergeOptions

PLANNED = 5  # weights of the short screen of --dry-run


@cli_command(MergeOptions, "merge base adapter -o merged")
@click.option(
    *("-a", "--adapter", "further"),
    type=Source(),
    multiple=True,
    metavar="[NAME=]ADAPTER",
    help="Adapter to merge, in place of an argument. May be repeated.",
)
def merge_command(adapters: tuple[str, ...], further: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Merge adapters into the weights of BASE: W' = W + Σ weight·scale·B·A, rounded once.

    BASE is a Hugging Face folder, a .safetensors, an .onnx or a .gguf file. The output is the same kind, with the same
    layout. PyTorch is not needed, and memory does not grow with the size of the model.
    """
    # A process that imports torch is not made faster by what `brisk` does.
    with startup.brisk() if options["device"] == "cpu" else contextlib.nullcontext(), shown() as on_progress:
        from lora_export.api.merge import merge
        from lora_export.report.console import console
        from lora_export.report.screens import print_merge, print_plan

        # Both together would leave the order of --weight open.
        if adapters and further:
            raise click.UsageError("give the adapters as arguments or by -a, not in both ways")
        if not adapters and not further:
            raise click.UsageError("Missing argument '[NAME=]ADAPTER...'.")
        result = merge(adapters=adapters or further, on_progress=on_progress, **options)
    if as_json:
        from lora_export.report.json_document import as_dict  # which imports the verdicts

        facts: dict[str, Any] = {} if result.report is None else {"output": str(result.output)}
        if result.residual_bytes is not None:
            facts["residual"] = {"path": str(options["keep_residual"]), "bytes": result.residual_bytes}
        print_document(facts | as_dict(result.report or result.plan))
    elif result.report is None:
        most = {Verbosity.QUIET: 0, Verbosity.SHORT: PLANNED, Verbosity.FULL: None}[verbosity()]
        print_plan(console(), result.plan, most)
    elif verbosity() is Verbosity.QUIET:
        print_wrote(result.output)
    else:
        print_merge(console(), result.report, result.output, whole=verbosity() is Verbosity.FULL)
