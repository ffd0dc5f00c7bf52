"""Options on how adapters are read, which every command that reads adapters has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from lora_export.cli.paths import FilePath


def _read_parts(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=1,0,1... as a table."""
    table = {}
    for text in texts:
        name, _, digits = text.rpartition("=")
        parts = digits.split(",")
        if not name or not set(parts) <= {"0", "1"}:
            raise click.BadParameter(f"{text} is not NAME=1,0,1")
        table[name] = tuple(part == "1" for part in parts)
    return table


ALLOW_PICKLE = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Also read pickles of PyTorch (.bin, .pt, .pth), by torch.load with weights_only=True.",
)
OPTIONS = (
    click.option(
        "--format",
        "format",
        metavar="NAME",
        help="Format of the adapters, where several formats fit. `lora-export guide adapters` lists them.",
    ),
    ALLOW_PICKLE,
    click.option("--lora-rank", type=int, metavar="R", help="Rank, for formats that do not record it."),
    click.option("--lora-alpha", type=float, metavar="ALPHA", help="Alpha, for formats that do not record it."),
    click.option(
        "--enable-lora",
        multiple=True,
        callback=_read_parts,
        metavar="NAME=1,0,1",
        help="Parts of a fused layer that have a pair, for loralib's MergedLinear. NAME ends the layer's name.",
    ),
    click.option(
        "--base-config",
        type=FilePath(),
        metavar="PATH",
        help="config.json of the model that the adapters were trained on, or its folder, for formats that need it. Not "
        "needed where the command has the base, or the adapter a config.json beside it.",
    ),
    click.option(
        "--component",
        type=click.Choice(["unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3"]),
        help="Use only the changes of this model, of an adapter for several models of a diffusion pipeline.",
    ),
    click.option(
        "--moe-b-layout",
        type=click.Choice(["rank_major", "grouped_by_expert"]),
        help="Order of the columns of B in an adapter of experts, where the adapter does not record it. Unsloth before "
        "2026.9.6 wrote grouped_by_expert, PEFT writes rank_major.",
    ),
)
FIELDS = (
    "format",
    "allow_pickle",
    "lora_rank",
    "lora_alpha",
    "enable_lora",
    "base_config",
    "component",
    "moe_b_layout",
)


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which gets those that were given as `reading`: the fields of a `ReadOptions`.

    They are no `ReadOptions` yet, so that a command imports NumPy when it chooses to.
    """

    @functools.wraps(command)
    def with_reading(*arguments: Any, **values: Any) -> Any:
        given = {name: values.pop(name) for name in FIELDS}
        reading = {name: value for name, value in given.items() if value is not None}
        return command(*arguments, reading=reading, **values)

    for option in reversed(OPTIONS):
        with_reading = option(with_reading)
    return with_reading
