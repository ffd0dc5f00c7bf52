"""`lora-export convert`: an adapter into another format."""

from __future__ import annotations

from typing import Any

import click

from lora_export.cli.arguments import Command, json_option, print_document, print_message, wrote
from lora_export.cli.parameters import takes_options
from lora_export.errors import one_line
from lora_export.options.adapters import ConvertOptions

EXAMPLE = """\b
Examples:
  lora-export convert de -o de.onnx_adapter --for served.onnx
  lora-export convert de -o de-mlx --to mlx"""


@click.command(cls=Command, epilog=EXAMPLE)
@takes_options(ConvertOptions)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Convert ADAPTER to another format, or for an existing graph: next week's adapter, without another export.

    What the format cannot express is refused by name, and no value is rounded. PyTorch is not needed.

    With --for, every tensor of the adapter needs an input of its shape and type in the graph, and the graph has to be
    unchanged since it was made. Both are checked before anything is written.
    """
    from lora_export.api.convert import convert

    result = convert(on_message=print_message, **options)
    output, to, is_for_graph = result.output, options["to"], "graph" in options
    if as_json and is_for_graph:
        print_document({"output": str(output), "weights": result.weights, "of": result.of, "base": result.base})
    elif as_json:
        print_document({"output": str(output), "to": to, "pairs": result.weights, "notes": list(result.notes)})
    elif is_for_graph:
        wrote(output, f": an adapter for {result.weights} of {result.of} weights")
    else:
        click.echo(f"wrote {one_line(str(output))}: {result.weights} pairs in the format {to}")
