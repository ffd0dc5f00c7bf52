"""`lora-export convert`: an adapter into another format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_export.cli.arguments import (
    Command,
    download_option,
    json_option,
    overwrite_option,
    print_document,
    print_message,
    wrote,
)
from lora_export.cli.paths import FilePath, Source
from lora_export.cli.reading import reading_options

EXAMPLE = """\b
Example:
  lora-export convert de -o de.onnx_adapter --for served.onnx"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("adapter", type=Source(), metavar="[NAME=]ADAPTER")
@click.option(
    "-o",
    "--output",
    required=True,
    type=FilePath(),
    metavar="OUT.onnx_adapter",
    help="File to write.",
)
@click.option(
    "--to",
    default="onnx_adapter",
    show_default=True,
    type=click.Choice(["onnx_adapter"]),
    expose_value=False,
    help="Format to write.",
)
@click.option(
    "--for",
    "graph",
    required=True,
    type=FilePath(),
    metavar="MODEL.onnx",
    help="Graph that will run the adapter, made by `onnx --lora inputs`.",
)
@click.option("--weight", type=float, default=1.0, show_default=True, help="Factor on the adapter's scale.")
@click.option(
    "--ignore-head",
    is_flag=True,
    help="Leave out the task head that the adapter saves whole. MODEL.onnx has to contain the same head.",
)
@reading_options
@overwrite_option
@download_option
@json_option
def command(
    adapter: str,
    output: Path,
    graph: Path,
    weight: float,
    reading: dict[str, Any],
    ignore_head: bool,
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Convert ADAPTER for an existing graph: next week's adapter, without another export.

    Every tensor of the adapter needs an input of its shape and type in the graph, and the graph has to be unchanged
    since it was made. Both are checked before anything is written. PyTorch is not needed.
    """
    from lora_export.api.convert import convert
    from lora_export.formats.read_options import ReadOptions

    result = convert(
        adapter,
        output,
        graph=graph,
        weight=weight,
        reading=ReadOptions(**reading),
        ignore_head=ignore_head,
        overwrite=overwrite,
        download=download,
        on_message=print_message,
    )
    if as_json:
        print_document({"output": str(output), "weights": result.weights, "of": result.of, "base": result.base})
    else:
        wrote(output, f": an adapter for {result.weights} of {result.of} weights")
