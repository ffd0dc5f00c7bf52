"""What commands have in common: how they are declared, where their defaults come from, how results are printed.

Defaults come from `LORA_EXPORT_*` and from the table `[tool.lora-export]` of the nearest pyproject.toml. An option of
another tool leads to its name here.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lora_export.cli import failures, verbosity
from lora_export.cli.failures import Invocation, answered
from lora_export.cli.failures import print_message as print_message
from lora_export.cli.parameters import EVERY_OPTION, other_tools, parameters_of, values_for, write_options
from lora_export.errors import WrongUsage, hint_of_name, one_line
from lora_export.isolation.limits import MAX_SETTINGS
from lora_export.options.declaring import Options
from lora_export.options.spelling import entry_text
from lora_export.storage import input_files

# --- Options of other tools ---


def renamed(error: click.NoSuchOption, ctx: click.Context) -> click.UsageError:
    """The error with the name that the option has in this command, where one is known."""
    written = error.option_name.partition("=")[0].replace("_", "-").lower()
    options = {name for parameter in ctx.command.params for name in parameter.opts}
    here = [f"--{name}" for name, others in other_tools()["options"].items() if written in others]
    possible = [name for name in (written, *here) if name in options]
    if possible:
        meant = " or ".join(f"'{name}'" for name in possible)
        return click.UsageError(f"No such option '{error.option_name}'. Did you mean {meant}?", ctx)
    first = next((one for one in ctx.command.params if isinstance(one, click.Argument)), None)
    if written in other_tools()["first_argument"] and first is not None:
        usage = f"{ctx.command_path} {' '.join(ctx.command.collect_usage_pieces(ctx))}"
        message = f"No such option '{error.option_name}'. {first.make_metavar(ctx)} is an argument: {usage}"
        return click.UsageError(message, ctx)
    return error


# --- Commands ---

CONFIGURATION = "lora_export.configuration"  # in the context's `meta`: the pyproject.toml that has the defaults
# Where a value comes from that is not an option's own default.
CHOSEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)


class Command(click.Command):
    """A command whose Python function may refuse its arguments: that is shown as click shows its own usage errors."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params += verbosity.options()

    def get_help_option(self, ctx: click.Context) -> click.Option | None:  # noqa: ARG002 - click's signature
        """As click's, with `all` as a value that it may have."""
        if self._help_option is None:
            self._help_option = click.Option(
                ["-h", "--help", "_help"],
                is_flag=False,
                flag_value="",
                default=None,
                expose_value=False,
                is_eager=True,
                metavar="[all]",
                callback=_show_help,
                help="Show this message and exit. `--help all` shows every option.",
            )
        return self._help_option

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
            try:
                self._take_defaults(ctx)
            except click.UsageError:
                if not {"-h", "--help"}.intersection(args):  # which shows the right names
                    raise
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise renamed(error, ctx) from error
        except click.BadParameter as error:
            if not (origin := _origin(error.param, ctx)):
                raise
            text = f"{error.message.rstrip('.')}; it is set {origin}"
            raise click.BadParameter(text, error.ctx, error.param, error.param_hint) from error

    def _take_defaults(self, ctx: click.Context) -> None:
        if ctx.auto_envvar_prefix is None:  # not called through `lora-export`
            return
        options = options_by_name(self)
        for option in options.values():
            option.envvar, option.allow_from_autoenv = [], False
        for name, option in options.items():
            option.envvar = [*(option.envvar or ()), f"{ctx.auto_envvar_prefix}_{_variable(name)}"]
        _check_variables(options, ctx.auto_envvar_prefix)
        ctx.default_map, ctx.meta[CONFIGURATION], left_out = defaults_of(self, str(ctx.info_name))
        for note in left_out:
            print_message(f"note: {note}")

    def invoke(self, ctx: click.Context) -> Any:
        """As click does. A note names the defaults that pyproject.toml changed."""
        changed = [
            f"{name} = {ctx.default_map[option.name]}"
            for option, name in {option: name for name, option in options_by_name(self).items()}.items()
            if ctx.default_map and ctx.get_parameter_source(str(option.name)) is ParameterSource.DEFAULT_MAP
        ]
        if changed:
            print_message(f"note: from {ctx.meta[CONFIGURATION]}: {', '.join(changed)}")
        try:
            return super().invoke(ctx)
        except WrongUsage as error:
            raise click.UsageError(str(error), ctx) from error


def _origin(parameter: click.Parameter | None, ctx: click.Context) -> str:
    """Where a wrong value comes from, for a message; empty for the command line."""
    source = ctx.get_parameter_source(str(parameter.name)) if parameter is not None else None
    if source is ParameterSource.DEFAULT_MAP:
        return f"in {ctx.meta[CONFIGURATION]}"
    names = parameter.envvar if source is ParameterSource.ENVIRONMENT and parameter is not None else None
    return f"by the variable {next(filter(os.environ.get, names))}" if names else ""


def _show_help(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is None or context.resilient_parsing:
        return
    context.meta[EVERY_OPTION] = value == "all"
    click.echo(context.get_help(), color=context.color)
    context.exit()


class TakesAdapters(Command):
    """A command that takes adapters by -a. `merge` takes them as arguments, so that users try that here too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with a message of its own for one argument too many."""
        ctx.allow_extra_args = True
        surplus = super().parse_args(ctx, args)
        if surplus and not ctx.resilient_parsing:
            raise click.UsageError(f"unexpected argument {surplus[0]}. An adapter is given by -a: -a {surplus[0]}", ctx)
        return surplus


def cli_command(
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
            value = [f"{name}={entry_text(choice)}" for name, choice in value.items()]
        opts = parameter.secondary_opts if value is False else parameter.opts
        spelling = [] if isinstance(parameter, click.Argument) else [max(opts, key=len, default="")]
        if isinstance(value, bool):
            words += filter(None, spelling)  # what switches a flag off, where something does
        else:
            words += [word for each in (value if parameter.multiple else [value]) for word in (*spelling, str(each))]
    return words


# --- Defaults from the environment ---


def _variable(name: str) -> str:
    return name.replace("-", "_").upper()


def _check_variables(options: Iterable[str], prefix: str) -> None:
    """Refuse a variable of this command that is no option of it. Note one that lacks the name of the command."""
    known, shared = {f"{prefix}_{_variable(name)}" for name in options}, prefix.rpartition("_")[0] + "_"
    for variable in sorted(name for name, value in os.environ.items() if value):
        if variable.startswith(f"{prefix}_") and variable not in known:
            raise click.UsageError(f"the variable {variable} names no option{hint_of_name(variable, known)}")
        of_command = f"{prefix}_{variable.removeprefix(shared)}"
        if variable.startswith(shared) and of_command in known:
            print_message(f"note: the variable {variable} sets no option: {of_command} does")


# --- Defaults from pyproject.toml ---

TABLE = "tool.lora-export"
NOT_OPTIONS = frozenset({"help", "version"})
# Options that may name code or who runs it, open pickles, or say what is written and signed. A file of somebody else
# does not set them.
MAY_NAME_CODE = frozenset({"model", "data", "runner"})
GUARDED = MAY_NAME_CODE | {
    *("allow-pickle", "output", "overwrite", "report", "cache", "keep-residual", "tensorboard", "ray", "sign"),
}


def defaults_of(command: click.Command, name: str) -> tuple[dict[str, Any], Path | None, list[str]]:
    """The defaults of a command's options, by parameter, the file that has them, and notes on what is left out of it.

    Keys of the table itself count for every command that has the option, those of `[tool.lora-export.COMMAND]` for one.
    Raises click.UsageError for a file that cannot be read, and for a key that no command has.
    """
    found = find_table()
    if found is None:
        return {}, None, []
    path, table = found
    options = options_by_name(command)
    shared = {key: value for key, value in table.items() if not isinstance(value, dict)}
    own = _own_table(table, name, path)
    if unknown := [key for key in own if _spelled(key) not in options]:
        raise _unknown(path, f"{TABLE}.{name}", unknown[0], options)
    _check_shared(shared, options, path)
    known = {key: value for key, value in shared.items() if _spelled(key) in options} | own
    defaults, left_out = {}, []
    for key, value in known.items():
        option = options[_spelled(key)]
        if why := _distrust(path, _spelled(key), value):
            left_out.append(f"`{key}` of {path} is left out: {why}. Give it on the command line")
        else:
            values = value if option.multiple and isinstance(value, list) else [value]
            if not all(_is_value(option, one) for one in values):
                kind = "true or false" if option.is_flag else option.type.name
                raise click.UsageError(f"{path}: `{key}` is {value!r}; it must be {kind}")
            defaults[option.name or ""] = values if option.multiple else value
    return defaults, path, left_out


def _is_value(option: click.Option, value: Any) -> bool:
    """Whether a value of TOML is of a type that the option takes."""
    if option.is_flag:
        return isinstance(value, bool)
    for type_, taken in ((click.types.IntParamType, int | str), (click.types.FloatParamType, int | float | str)):
        if isinstance(option.type, type_):  # click would cut 1.9 to 1
            return isinstance(value, taken) and not isinstance(value, bool)
    return isinstance(value, str) and "\0" not in value  # which no path has


def _distrust(path: Path, option: str, value: Any) -> str:
    """Why a value is not taken from a file that was found: it may be somebody else's. Empty where it is."""
    is_here = path.parent == Path.cwd()
    if option not in GUARDED:
        return ""
    if hasattr(os, "geteuid") and path.stat().st_uid != os.geteuid():
        return "the file belongs to another user"
    if not is_here and not (path.parent / ".git").exists():
        return "the file is neither in the current folder nor in the root of a git repository"
    if option in MAY_NAME_CODE and not is_here and ":" in str(value):
        return "code is named by a file in the current folder alone"
    return ""


def find_table() -> tuple[Path, dict[str, Any]] | None:
    """The nearest pyproject.toml, from the current folder upward, that has the table; and the table."""
    try:
        here = Path.cwd()
    except OSError:  # the current folder was removed
        return None
    for folder in (here, *here.parents):
        path = folder / "pyproject.toml"
        if path.is_file() and (table := _table_in(path)) is not None:
            return path, table
    return None


def options_by_name(command: click.Command) -> dict[str, click.Option]:
    """The options of a command by their long spellings, without the dashes."""
    options = (parameter for parameter in command.params if isinstance(parameter, click.Option))
    named = {flag[2:]: option for option in options for flag in option.opts if flag.startswith("--")}
    return {name: option for name, option in named.items() if name not in NOT_OPTIONS}


def _table_in(path: Path) -> dict[str, Any] | None:
    with input_files.open_regular(path) as file:
        text = file.read(MAX_SETTINGS + 1)
    if len(text) > MAX_SETTINGS:
        raise click.UsageError(f"{path} has more than {MAX_SETTINGS:,} bytes")
    if b"lora-export" not in text:  # the parser is imported where there is something to parse
        return None
    import tomllib

    try:
        table = tomllib.loads(text.decode("utf-8")).get("tool", {}).get("lora-export")
    except (ValueError, AttributeError, RecursionError) as error:
        raise click.UsageError(f"{path} is not valid TOML: {error}") from error
    if table is not None and not isinstance(table, dict):
        raise click.UsageError(f"{path}: {TABLE} is not a table")
    return table


def _own_table(table: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    from lora_export.cli import COMMANDS

    for key, value in table.items():
        if isinstance(value, dict) and key not in COMMANDS:
            raise _unknown(path, TABLE, key, COMMANDS)
    own = table.get(name, {})
    if not isinstance(own, dict):
        raise click.UsageError(f"{path}: {TABLE}.{name} is not a table")
    return own


def _check_shared(shared: Iterable[str], options: Mapping[str, click.Option], path: Path) -> None:
    """Refuse keys that no command has. The other commands are imported for a key that this one lacks."""
    others = [key for key in shared if _spelled(key) not in options]
    if not others:
        return
    from lora_export.cli import COMMANDS, command_named

    known = {option for name in COMMANDS for option in options_by_name(command_named(name))}
    for key in others:
        if _spelled(key) not in known:
            raise _unknown(path, TABLE, key, known)


def _spelled(key: str) -> str:
    return key.replace("_", "-")


def _unknown(path: Path, table: str, key: str, known: Iterable[str]) -> click.UsageError:
    near = hint_of_name(_spelled(key), known)
    return click.UsageError(f"{path}: [{table}] has the key `{key}`, which is no option{near}")
