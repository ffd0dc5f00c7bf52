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
from lora_export.errors import one_line

EXAMPLE = """\b
Examples:
  lora-export convert de -o de.onnx_adapter --for served.onnx
  lora-export convert de -o de-mlx --to mlx"""


@click.command(cls=Command, epilog=EXAMPLE)
@click.argument("adapter", type=Source(), metavar="[NAME=]ADAPTER")
@click.option(
    "-o",
    "--output",
    required=True,
    type=FilePath(),
    metavar="OUT",
    help="File or folder to write.",
)
@click.option(
    "--to",
    default="onnx_adapter",
    show_default=True,
    type=click.Choice(["onnx_adapter", "peft", "mlx", "gguf", "kohya", "comfyui", "diffusers"]),
    help="Format to write.",
)
@click.option(
    "--for",
    "graph",
    type=FilePath(),
    metavar="MODEL.onnx",
    help="With --to onnx_adapter: graph that will run the adapter, made by `onnx --lora inputs`.",
)
@click.option(
    "--base",
    type=FilePath(),
    metavar="CHECKPOINT",
    help="Model that the adapter was trained on: for --names, --to gguf, and formats that need its config.",
)
@click.option(
    "--names",
    type=click.Choice(["transformers4", "transformers5", "vllm", "sglang"]),
    help="With --to peft: whose names the modules get. transformers4 and vllm: those of the original checkpoint; "
    "sglang: the same, with all experts of a projection in one tensor; transformers5: those of the loaded model.",
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
    to: str,
    graph: Path | None,
    base: Path | None,
    names: str | None,
    weight: float,
    reading: dict[str, Any],
    ignore_head: bool,
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Convert ADAPTER to another format, or for an existing graph: next week's adapter, without another export.

    What the format cannot express is refused by name, and no value is rounded. PyTorch is not needed.

    With --for, every tensor of the adapter needs an input of its shape and type in the graph, and the graph has to be
    unchanged since it was made. Both are checked before anything is written.
    """
    from lora_export.api.convert import convert
    from lora_export.formats.read_options import ReadOptions

    result = convert(
        adapter,
        output,
        to=to,
        graph=graph,
        base=base,
        names=names,
        weight=weight,
        reading=ReadOptions(**reading),
        ignore_head=ignore_head,
        overwrite=overwrite,
        download=download,
        on_message=print_message,
    )
    if as_json and graph is None:
        print_document({"output": str(result.output), "to": to, "pairs": result.weights, "notes": list(result.notes)})
    elif as_json:
        print_document({"output": str(output), "weights": result.weights, "of": result.of, "base": result.base})
    elif graph is None:
        click.echo(f"wrote {one_line(str(result.output))}: {result.weights} pairs in the format {to}")
    else:
        wrote(output, f": an adapter for {result.weights} of {result.of} weights")
