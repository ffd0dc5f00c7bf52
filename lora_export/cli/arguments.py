"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lora_export.errors import InputRefused, one_line

if TYPE_CHECKING:
    from lora_export.lora import Adapter
    from lora_export.models.model import Model

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
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="The precision in which MODEL is deployed: its weights are rounded to it, and the gates are PyTorch's in it.",
)
inputs_option = click.option(
    "--inputs",
    "inputs_file",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Check on these inputs too (arrays named like the model's inputs).",
)


class TakesAdapters(click.Command):
    """A command whose adapters are an option's; `merge` has them as an argument, so that this one is told of -a."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but for what it says of one argument too many."""
        ctx.allow_extra_args = True
        surplus = super().parse_args(ctx, args)
        if surplus and not ctx.resilient_parsing:
            raise click.UsageError(f"unexpected argument {surplus[0]}. An adapter is given by -a: -a {surplus[0]}", ctx)
        return surplus


MODES = {
    "merged": "fold the adapters into the weights",
    "nodes": "keep A and B beside them",
    "inputs": "make A and B optional inputs, each adapter a file of its own",
    "rows": "let each row of a batch choose its adapter",
}


def publishing_options(*modes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What every command takes that proves a file before it publishes it; `modes` are what it can do with adapters."""
    told = "; ".join(f"{mode}: {MODES[mode]}" for mode in modes)
    mode = click.option(
        "--lora", "mode", type=click.Choice(modes), default=modes[0], show_default=True, help=f"{told}."
    )
    no_verify = click.option("--no-verify", is_flag=True, help="Publish without proof; the file records that.")
    options = [adapters_option, adapter_weights, mode, inputs_option, no_verify, overwrite_option, json_option]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def refuse_exported(model: str) -> None:
    """Raises InputRefused where a .pt2 is to be exported again, or trained: it is a graph, and no module's code."""
    if model.endswith(".pt2"):
        raise InputRefused(
            f"{model} is a program that was exported already. `lora-export verify` takes it, as --model and as "
            "CANDIDATE; to make another file, give the model that it was exported from"
        )


def answer(document: Any) -> None:
    """The one JSON document on stdout. GitHub's runner would take a `##[` in a name for a command."""
    click.echo(json.dumps(document, allow_nan=False).replace("##[", "##\\u005b"))


def say(line: str) -> None:
    """A line of the story, on stderr: one line, whatever the names in it hold; unheard, the work goes on."""
    with contextlib.suppress(OSError):
        click.echo(one_line(line), err=True)


def split_name(argument: str) -> tuple[str | None, Path]:
    """`NAME=PATH` or `PATH`. A path that exists as it stands is taken as a path."""
    name, separator, path = argument.partition("=")
    if not separator or Path(argument).exists() or "/" in name:
        return None, Path(argument)
    return name, Path(path)


def loaded_model(source: str, adapters: Sequence[Adapter], dtype: str) -> Model:
    """MODEL in the precision of --dtype."""
    import torch

    from lora_export.models.load import load_model

    return load_model(source, adapters, dtype=getattr(torch, dtype))


def load_adapters(arguments: Sequence[str]) -> list[Adapter]:
    """The adapters of `-a [NAME=]ADAPTER`, in order."""
    from lora_export import formats

    return [formats.load(path, name=name) for name, path in map(split_name, arguments)]


def command_line() -> list[str]:
    """The command as it was given, defaults left out, to be given again."""
    context = click.get_current_context()
    words = ["lora-export", str(context.info_name)]
    for parameter in context.command.params:
        if context.get_parameter_source(str(parameter.name)) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[str(parameter.name)]
        spelling = [] if isinstance(parameter, click.Argument) else [max(parameter.opts, key=len)]
        if value is True:
            words += spelling
        else:
            words += [word for each in (value if parameter.multiple else [value]) for word in (*spelling, str(each))]
    return words
