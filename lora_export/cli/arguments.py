"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
from click.core import ParameterSource

from lora_export.cli import configuration, failures, foreign_options, help_sections, verbosity
from lora_export.cli.application_options import combination_options, tied_option
from lora_export.cli.failures import Invocation, answered
from lora_export.cli.failures import print_message as print_message
from lora_export.cli.paths import FilePath, Source
from lora_export.cli.reading import reading_options
from lora_export.errors import WrongUsage, one_line

CONFIGURATION = "lora_export.configuration"  # in the context's `meta`: the pyproject.toml that has the defaults
# Where a value comes from that is not an option's own default.
CHOSEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)

adapter_weights = click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="W",
    help="Factor on an adapter's scale. Once per adapter, in the same order (default: 1.0).",
)


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output, in one step.")
download_option = click.option(
    "--download", is_flag=True, help="Download models and adapters named as on the Hugging Face Hub, if not cached."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")


def truncation_options(command: Callable[..., None]) -> Callable[..., None]:
    """The rank of pairs that an SVD makes."""
    rank = click.option("--rank", type=int, metavar="R", help="Rank of each pair. With --energy: at most this rank.")
    energy = click.option(
        "--energy",
        type=float,
        metavar="E",
        help="Share of each change's ‖ΔW‖² that is kept, above 0 and at most 1: the least rank that holds it.",
    )
    return rank(energy(command))


adapters_option = click.option(
    "-a",
    "--adapter",
    "adapters",
    type=Source(),
    multiple=True,
    metavar="[NAME=]ADAPTER",
    help="Adapter to apply. May be repeated.",
)


def _read_layouts(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=LAYOUT... as a table. Later ones come last: the last one that matches a weight counts."""
    layouts: dict[str, str] = {}
    for text in texts:
        name, _, layout = text.rpartition("=")
        if not name or layout not in ("out_in", "in_out"):
            raise click.BadParameter(f"{text} is not NAME=out_in or NAME=in_out")
        layouts.pop(name, None)
        layouts[name] = layout
    return layouts


def _read_prefixes(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """FROM=TO... as a table."""
    prefixes: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or old == new:
            raise click.BadParameter(f"{text} is not FROM=TO, such as model.=model.language_model.")
        if prefixes.setdefault(old, new) != new:
            raise click.BadParameter(f"{old} is given twice")
    return prefixes


def _read_sizes(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, int]:
    """AXIS=SIZE... as a table."""
    sizes = {}
    for text in texts:
        name, _, size = text.partition("=")
        if not name or not size.isdecimal() or not int(size):
            raise click.BadParameter(f"{text} is not AXIS=SIZE, such as sequence=128")
        sizes[name] = int(size)
    return sizes


fixed_option = click.option(
    "--fixed",
    multiple=True,
    callback=_read_sizes,
    metavar="AXIS=SIZE",
    help="An axis, such as `sequence`, that CANDIDATE has in one size on purpose. Without it, an axis that CANDIDATE "
    "fixes and MODEL does not makes the verdict `undecided`. May be repeated.",
)
layout_option = click.option(
    "--layout",
    multiple=True,
    callback=_read_layouts,
    metavar="NAME=in_out|out_in",
    help="Layout of a square matrix of a checkpoint: out_in (nn.Linear) or in_out (transformers' Conv1D). NAME is a "
    "tensor, a module or a glob such as '*'. Needed only where neither config.json nor the adapter determines it. May "
    "be repeated: the last match counts.",
)
prefix_option = click.option(
    "--prefix",
    "prefixes",
    multiple=True,
    callback=_read_prefixes,
    metavar="FROM=TO",
    help="Replace the beginning FROM of names in the adapters by TO: for an adapter of a text model on a multimodal "
    "base. May be repeated.",
)
provider_option = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Execution provider on which onnxruntime must run.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision of the deployed model. Tolerances follow PyTorch's own error in that precision.",
)
timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop a run of CANDIDATE or of a graph that takes longer than this.",
)
inputs_option = click.option(
    "--inputs",
    "inputs_file",
    type=FilePath(),
    metavar="FILE.npz",
    help="Further inputs for the proof: one array for each input of the model, by its name. They are the example where "
    "the inputs of a Hugging Face model cannot be generated.",
)


class Command(click.Command):
    """A command whose Python function may refuse its arguments: that is shown as click shows its own usage errors.

    `sections` are those of its `--help` that no other command has.
    """

    def __init__(self, *args: Any, sections: help_sections.Sections = MappingProxyType({}), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params += verbosity.options()
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, in sections."""
        help_sections.write_options(self.get_params(ctx), self.sections, ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with defaults from the environment and from pyproject.toml.

        A failure from here on is that of this command.
        """
        if (invocation := ctx.find_object(Invocation)) is not None:
            invocation.context = ctx
        if not ctx.resilient_parsing:  # which is completion, and must not fail
            self._take_defaults(ctx)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise foreign_options.renamed(error, ctx) from error

    def _take_defaults(self, ctx: click.Context) -> None:
        if ctx.auto_envvar_prefix is None:  # not called through `lora-export`
            return
        for name, option in configuration.options_of(self).items():
            option.envvar = f"{ctx.auto_envvar_prefix}_{name.replace('-', '_').upper()}"
        ctx.default_map, ctx.meta[CONFIGURATION] = configuration.defaults_of(self, str(ctx.info_name))

    def invoke(self, ctx: click.Context) -> Any:
        """As click does. A note names the defaults that pyproject.toml changed."""
        changed = [
            f"{name} = {ctx.default_map[option.name]}"
            for name, option in configuration.options_of(self).items()
            if ctx.default_map and ctx.get_parameter_source(str(option.name)) is ParameterSource.DEFAULT_MAP
        ]
        if changed:
            print_message(f"note: from {ctx.meta[CONFIGURATION]}: {', '.join(changed)}")
        try:
            return super().invoke(ctx)
        except WrongUsage as error:
            raise click.UsageError(str(error), ctx) from error


class TakesAdapters(Command):
    """A command that takes adapters by -a. `merge` takes them as arguments, so that users try that here too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with a message of its own for one argument too many."""
        ctx.allow_extra_args = True
        surplus = super().parse_args(ctx, args)
        if surplus and not ctx.resilient_parsing:
            raise click.UsageError(f"unexpected argument {surplus[0]}. An adapter is given by -a: -a {surplus[0]}", ctx)
        return surplus


MODES = {
    "merged": "fold the adapters into the weights",
    "nodes": "keep A and B as nodes beside the weights",
    "inputs": "make A and B optional inputs, with one file per adapter",
    "rows": "choose the adapter of each batch row by an input",
}


def publishing_options(*modes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What every command takes that proves a file before it publishes it; `modes` are what it can do with adapters."""
    explained = "; ".join(f"{mode}: {MODES[mode]}" for mode in modes)
    mode = click.option(
        "--lora", "mode", type=click.Choice(modes), default=modes[0], show_default=True, help=f"{explained}."
    )
    no_verify = click.option("--no-verify", is_flag=True, help="Publish without a proof. The file records that.")
    options: list[Callable[..., Any]] = [
        adapters_option,
        adapter_weights,
        prefix_option,
        reading_options,
        combination_options("--combine"),
        tied_option,
        mode,
        inputs_option,
        no_verify,
        overwrite_option,
        download_option,
        json_option,
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def print_document(document: Any, indent: int | None = None) -> None:
    """Print the one JSON document on stdout."""
    answered()
    failures.print_json(document, indent)


def wrote(path: Path, more: str = "") -> None:
    """Print that a file was written, with its size."""
    click.echo(f"wrote {one_line(str(path))} ({path.stat().st_size:,} bytes){more}")


def runs_in_ci() -> bool:
    """Whether this is a job of CI, by the environment: GitHub, GitLab, CircleCI and others set CI=true."""
    return os.environ.get("CI", "").lower() in ("true", "1")


def command_line() -> list[str]:
    """The command as it was given, to be given again; with what the environment and pyproject.toml added.

    -q and -v change no result.
    """
    context = click.get_current_context()
    words = ["lora-export", str(context.info_name)]
    for parameter in context.command.params:
        if str(parameter.name) not in context.params:
            continue
        if context.get_parameter_source(str(parameter.name)) not in CHOSEN:
            continue
        value = context.params[str(parameter.name)]
        if isinstance(value, dict):
            value = [f"{name}={choice}" for name, choice in value.items()]
        spelling = [] if isinstance(parameter, click.Argument) else [max(parameter.opts, key=len)]
        if value is True:
            words += spelling
        else:
            words += [word for each in (value if parameter.multiple else [value]) for word in (*spelling, str(each))]
    return words
