"""`lora-export convert`: an adapter into another format."""

from __future__ import annotations

from pathlib import Path

import click

from lora_export.cli.arguments import Command, answer, json_option, overwrite_option, say, wrote


@click.command(cls=Command)
@click.argument("adapter", metavar="[NAME=]ADAPTER")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT.onnx_adapter",
    help="The file to write.",
)
@click.option(
    "--to", required=True, type=click.Choice(["onnx_adapter"]), expose_value=False, help="The format to write."
)
@click.option(
    "--for",
    "graph",
    required=True,
    type=click.Path(path_type=Path),
    metavar="MODEL.onnx",
    help="The graph that will run it, made by `onnx --lora inputs`.",
)
@click.option("--weight", type=float, default=1.0, show_default=True, help="Multiply the adapter's scale.")
@overwrite_option
@json_option
def command(adapter: str, output: Path, graph: Path, weight: float, overwrite: bool, as_json: bool) -> None:
    """Convert ADAPTER for a graph that is there already: next week's adapter, without exporting again.

    Every tensor of the adapter must have its place in the graph, in shape and type, and the graph must
    be as it was when it was made, before anything is written. Needs no PyTorch.
    """
    from lora_export.api.convert import convert

    result = convert(adapter, output, graph=graph, weight=weight, overwrite=overwrite, on_message=say)
    if as_json:
        answer({"output": str(output), "weights": result.weights, "of": result.of, "base": result.base})
    else:
        wrote(output, f": an adapter for {result.weights} of {result.of} weights")
