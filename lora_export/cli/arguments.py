"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_export.errors import printable

if TYPE_CHECKING:
    from lora_export.lora import Adapter

adapter_weights = click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="W",
    help="Multiply an adapter's scale; once per adapter, in order (default 1.0).",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output in one step.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
adapters_option = click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]ADAPTER",
    help="An adapter to apply; may be repeated.",
)
provider_option = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where onnxruntime must run the candidate.",
)
inputs_option = click.option(
    "--inputs",
    "inputs_file",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Check on these inputs too (arrays named like the model's inputs).",
)


def publishing_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every command takes that proves a file before it publishes it."""
    modes = click.option(
        "--lora",
        "mode",
        type=click.Choice(["merged", "nodes"]),
        default="merged",
        show_default=True,
        help="Fold the adapters into the weights, or keep A and B beside them.",
    )
    no_verify = click.option("--no-verify", is_flag=True, help="Publish without proof; the file records that.")
    for option in reversed(
        [adapters_option, adapter_weights, modes, inputs_option, no_verify, overwrite_option, json_option]
    ):
        command = option(command)
    return command


def say(line: str) -> None:
    """A line of the story, on stderr."""
    click.echo(printable(line), err=True)


def split_name(argument: str) -> tuple[str | None, Path]:
    """`NAME=PATH` or `PATH`. A path that exists as it stands is taken as a path."""
    name, separator, path = argument.partition("=")
    if not separator or Path(argument).exists() or "/" in name:
        return None, Path(argument)
    return name, Path(path)


def load_adapters(arguments: Sequence[str]) -> list[Adapter]:
    """The adapters of `-a [NAME=]ADAPTER`, in order."""
    from lora_export import formats

    return [formats.load(path, name=name) for name, path in map(split_name, arguments)]
