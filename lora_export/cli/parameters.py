"""The parameters of a command, made from the record of its options; and what other tools call these."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from lora_export.errors import count
from lora_export.options.declaring import Declared, Options, Positional, Section, nested_in, options_of
from lora_export.options.spelling import as_command_line

EVERY_OPTION = "lora_export.every_option"  # in the context's `meta`: whether `--help all` was given


class FilePath(click.Path):
    """A path as a `pathlib.Path`."""

    def __init__(self, **checks: Any):
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, in the home folder where the path begins with `~`; or the address of an object in a store."""
        if isinstance(value, str) and "://" in value:
            from lora_export.storage.store_path import is_hub_address, place  # few commands have an address

            return value if is_hub_address(value) else place(value)
        return super().convert(_expanded(value) if isinstance(value, str) else value, param, ctx)


class Source(click.ParamType[str]):
    """MODEL or [NAME=]ADAPTER: a path, a name that is looked up, or a name with a path."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        """The text, with the home folder where the path begins with `~`."""
        name, separator, path = value.partition("=")
        if separator and not os.path.lexists(value):
            _refuse_empty(path)
        return f"{name}={_expanded(path)}" if separator and path.startswith("~") else _expanded(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Let the shell complete a path."""
        return [CompletionItem(incomplete, type="file")]


def _expanded(text: str) -> str:
    """The path in the home folder; a file whose name begins with `~` stays what it is. Raises as `_refuse_empty`."""
    _refuse_empty(text)
    if not text.startswith("~") or os.path.lexists(text):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:  # there is no such user
        return text


def _refuse_empty(path: str) -> None:
    """Raise BadParameter for an empty path: Path("") would be the current folder."""
    if not path:
        raise click.BadParameter("the path is empty, as an unset variable of the shell is")


class SectionedOption(click.Option):
    """An option with the heading of `--help` under which it is shown."""

    def __init__(self, *args: Any, section: Section = Section.OPTIONS, often: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section, self.often = section, often


@functools.cache
def other_tools() -> Mapping[str, Any]:
    """What other tools call the commands and options here."""
    import tomllib

    return tomllib.loads((Path(__file__).parent / "other_tools.toml").read_text(encoding="utf-8"))


def command_line_spelling() -> AbstractContextManager[None]:
    """Let messages spell options as flags within the block. All records are imported when the first one is spelled."""

    def flags() -> Mapping[str, str]:
        from lora_export.options.commands import declared_flags

        return declared_flags()

    return as_command_line(flags)


def parameters_of(record: type[Options]) -> list[click.Parameter]:
    """The parameters of a command: arguments first, those of nested records last."""
    found = [(one.name, one) for one in options_of(record) if not one.option.python_only]
    for name, nested in nested_in(record).items():
        own = options_of(nested.record)
        found += [(f"{name}_{one.name}", one.with_flags(nested.flags.get(one.name, ()))) for one in own]
    # A help text names options of its own command, or of others by their usual flags: no other record is imported.
    flags = {one.name: one.flags[0] for _, one in found}
    with as_command_line(lambda: flags):
        return [_parameter(name, one) for name, one in found]


def values_for(record: type[Options], values: dict[str, Any]) -> dict[str, Any]:
    """Turn the values of click's parameters into the keywords of the record, those of nested records into records.

    What was not given and has no default of click's own is left out.
    """
    keywords = dict(values)
    for declared in options_of(record):
        if (switch := _switch(declared)) in keywords:
            keywords[declared.name] = not keywords.pop(switch)
    for name, nested in nested_in(record).items():
        own = {declared.name: keywords.pop(f"{name}_{declared.name}", None) for declared in options_of(nested.record)}
        keywords[name] = nested.record(**{key: value for key, value in own.items() if value is not None})
    return {key: value for key, value in keywords.items() if value is not None}


def _parameter(name: str, declared: Declared) -> click.Parameter:
    option = declared.option
    settings: dict[str, Any] = {"type": _type_of(declared)}
    if option.metavar:
        settings["metavar"] = option.metavar
    if isinstance(option, Positional):
        settings["nargs"] = -1 if declared.multiple else 1
        return click.Argument([name], required=not option.optional, **settings)
    if option.read is not None:
        settings["callback"] = _callback(option.read)
    if declared.kind == "flag":
        settings = {"is_flag": True} if "/" not in declared.flags[-1] else {}
    elif declared.multiple:
        settings["multiple"] = True
    settings |= _default(declared)
    name = _switch(declared) or name
    settings |= {"section": declared.section, "often": option.often, "help": option.help_text()}
    return SectionedOption([*declared.flags, name], **settings)


def _switch(declared: Declared) -> str:
    """click's name of a flag that switches off what is on by default; empty for all other options."""
    return f"no_{declared.name}" if declared.kind == "flag" and declared.default is True else ""


def _default(declared: Declared) -> dict[str, Any]:
    """The default as click takes it. An empty text and None are no default."""
    if declared.option.command_line_default is not None:
        return {"default": declared.option.command_line_default}
    if declared.default is MISSING:
        return {"required": True}
    if declared.kind == "flag":
        return {"default": False}
    if declared.multiple or declared.default in (None, ""):
        return {"show_default": declared.option.shown_default} if declared.option.shown_default else {}
    return {"default": declared.default, "show_default": True}


def _type_of(declared: Declared) -> Any:
    option, kind = declared.option, declared.kind
    if option.read is not None:
        return None
    if kind == "choice":
        return click.Choice(declared.choices)
    if kind in ("path", "folder"):
        return FilePath() if kind == "path" else FilePath(file_okay=False)
    if kind == "source":
        return Source()
    if kind in ("int", "float"):
        number: Any = click.IntRange if kind == "int" else click.FloatRange
        low = option.at_least if option.at_least is not None else option.above
        high = option.at_most if option.at_most is not None else option.below
        if low is None and high is None:
            return int if kind == "int" else float
        return number(low, high, min_open=option.above is not None, max_open=option.below is not None)
    return None


def _callback(read: Callable[[Iterable[str]], Any]) -> Callable[..., Any]:
    def convert(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> Any:
        try:
            return read(texts)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return convert


MANY = 24  # options of a command: with more, `--help` shows those that are often used
OF_EVERY_COMMAND = ("--json", "--quiet", "--verbose", "--help")


def write_options(params: Iterable[click.Parameter], context: click.Context, formatter: click.HelpFormatter) -> None:
    """Write a command's options, in sections. The order inside of a section is that of the command.

    Of many options, those are written that are often used, unless `--help all` was given.
    """
    rows: dict[Section, list[tuple[str, str]]] = {section: [] for section in Section}
    params = list(params)
    is_short = len(params) > MANY and not context.meta.get(EVERY_OPTION)
    shown = [param for param in params if not is_short or getattr(param, "often", True) or param.required]
    for param in shown:
        if record := param.get_help_record(context):
            is_common = any(name in OF_EVERY_COMMAND for name in param.opts)
            rows[Section.FILES if is_common else getattr(param, "section", Section.OPTIONS)].append(record)
    for heading, records in rows.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)
    if more := len(params) - len(shown):
        formatter.write(f"\n{count(more, 'more option')}: {context.command_path} --help all\n")
