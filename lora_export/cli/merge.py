"""`lora-export merge`: adapters into the weights of a checkpoint or a graph."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from lora_export.cli import startup
from lora_export.cli.arguments import Command, json_option, print_document, print_message
from lora_export.cli.parameters import Source, takes_options
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.errors import one_line
from lora_export.options.merge import MergeOptions

PLANNED = 5  # weights of the short screen of --dry-run


EXAMPLE = """\b
Example:
  lora-export merge base adapter -o merged"""


@click.command(cls=Command, epilog=EXAMPLE)
@takes_options(MergeOptions)
@click.option(
    "-a",
    "--adapter",
    "further",
    type=Source(),
    multiple=True,
    metavar="[NAME=]ADAPTER",
    help="Adapter to merge, in place of an argument. May be repeated.",
)
@json_option
def command(adapters: tuple[str, ...], further: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Merge adapters into the weights of BASE: W' = W + Σ weight·scale·B·A, rounded once.

    BASE is a Hugging Face folder, a .safetensors file or an .onnx file. The output is the same kind, with the same
    layout. PyTorch is not needed, and memory does not grow with the size of the model.
    """
    # A process that imports torch is not made faster by what `brisk` does.
    with startup.brisk() if options["device"] == "cpu" else contextlib.nullcontext(), shown() as on_progress:
        from lora_export.api.merge import merge
        from lora_export.report.console import console
        from lora_export.report.merge_screen import print_merge_report, print_merge_summary, print_plan

        chosen = _one_way(adapters, further)
        result = merge(adapters=chosen, on_message=print_message, on_progress=on_progress, **options)
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
        click.echo(f"wrote {one_line(str(result.output))}")
    elif verbosity() is Verbosity.FULL:
        print_merge_report(console(), result.report, result.output)
    else:
        print_merge_summary(console(), result.report, result.output)


def _one_way(arguments: tuple[str, ...], options: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters, which are given as arguments or by -a. Both together would leave the order of --weight open."""
    if arguments and options:
        raise click.UsageError("give the adapters as arguments or by -a, not in both ways")
    if not arguments and not options:
        raise click.UsageError("Missing argument '[NAME=]ADAPTER...'.")
    return arguments or options
