"""What commands have in common: how they are declared, where their defaults come from, how results are printed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lora_export.cli import configuration, failures, foreign_options, verbosity
from lora_export.cli.failures import Invocation, answered
from lora_export.cli.failures import print_message as print_message
from lora_export.cli.parameters import parameters_of, values_for, write_options
from lora_export.errors import WrongUsage, one_line
from lora_export.options.declaring import Options

CONFIGURATION = "lora_export.configuration"  # in the context's `meta`: the pyproject.toml that has the defaults
# Where a value comes from that is not an option's own default.
CHOSEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)


class Command(click.Command):
    """A command whose Python function may refuse its arguments: that is shown as click shows its own usage errors."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params += verbosity.options()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, in sections."""
        write_options(self.get_params(ctx), ctx, formatter)

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
        for name, option in configuration.options_by_name(self).items():
            option.envvar = f"{ctx.auto_envvar_prefix}_{name.replace('-', '_').upper()}"
        ctx.default_map, ctx.meta[CONFIGURATION] = configuration.defaults_of(self, str(ctx.info_name))

    def invoke(self, ctx: click.Context) -> Any:
        """As click does. A note names the defaults that pyproject.toml changed."""
        changed = [
            f"{name} = {ctx.default_map[option.name]}"
            for name, option in configuration.options_by_name(self).items()
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


def command(
    record: type[Options] | None, *examples: str, cls: type[Command] = Command, json: bool = True
) -> Callable[[Callable[..., Any]], Command]:
    """Make a function `NAME_command` a command with the options of a record, besides those that it declares itself.

    The function gets the keywords of the record, with the one that prints messages. `examples` end the help.
    """
    epilog = "\n  ".join(
        [f"\b\nExample{'s' if len(examples) > 1 else ''}:", *(f"lora-export {one}" for one in examples)]
    )

    def decorate(function: Callable[..., Any]) -> Command:
        parameters = [] if record is None else parameters_of(record)
        parameters += reversed(getattr(function, "__click_params__", []))
        if json:
            help_text = "Print exactly one JSON document on stdout."
            parameters.append(click.Option(["--json", "as_json"], is_flag=True, help=help_text))

        @functools.wraps(function)
        def call(**values: Any) -> Any:
            if record is None:
                return function(**values)
            reports = any(field.name == "on_message" for field in dataclasses.fields(record))  # type: ignore[arg-type]
            return function(**values_for(record, values), **({"on_message": print_message} if reports else {}))

        call.__dict__.pop("__click_params__", None)
        name = function.__name__.removesuffix("_command")
        return click.command(name, cls=cls, params=parameters, epilog=epilog)(call)

    return decorate


def print_document(document: Any, indent: int | None = None) -> None:
    """Print the one JSON document on stdout."""
    answered()
    failures.print_json(document, indent)


def wrote(path: Path, more: str = "") -> None:
    """Print that a file was written, with its size."""
    print_wrote(path, f" ({path.stat().st_size:,} bytes){more}")


def print_wrote(path: Path, more: str = "") -> None:
    """Print that a file or folder was written."""
    click.echo(f"wrote {one_line(str(path))}{more}")


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
