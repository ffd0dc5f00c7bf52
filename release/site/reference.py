"""The pages of the reference: each command with its options on both sides, and what else `lora_export` has."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import click

import lora_export
from lora_export.cli import COMMANDS, command_named
from lora_export.options.declaring import Section

Keywords = Mapping[str, inspect.Parameter]
OF_ALL = ("json", "quiet", "verbose")  # options of every command
BEGINNING = re.compile(r"\b(?:pathlib|collections\.abc|lora_export(?:\.\w+)*|numpy(?:\.\w+)*)\.(?=\w)")


def commands() -> dict[str, str]:
    """Command -> its page."""
    return {name: _command_page(name) for name in COMMANDS}


def parts() -> str:
    """The page of the public names that are no command."""
    own = {_function_of(name) for name in COMMANDS}
    lines = [
        "# The parts, in Python",
        "What the commands are made of. All names are in `lora_export`, and are imported when they are first used. The "
        "functions of the commands are on the pages of the commands.",
    ]
    for name in lora_export.__all__:
        if name not in own:
            lines += _part(name, getattr(lora_export, name))
    return "\n\n".join(lines) + "\n"


def _command_page(name: str) -> str:
    command = command_named(name)
    context = click.Context(command, info_name=f"lora-export {name}")
    usage = " ".join(["lora-export", name, *command.collect_usage_pieces(context)])
    help_text, function = inspect.cleandoc(command.help or ""), _function_of(name)
    keywords = inspect.signature(getattr(lora_export, function)).parameters if function else {}
    lines = [f"# lora-export {name}", _prose(help_text), _fenced("text", usage)]
    lines += [_fenced("sh", "\n".join(re.findall(r"^ *(lora-export .*)$", command.epilog or "", re.M)))]
    lines += ["## Options", *_options(command, keywords)]
    if function:
        prose = (inspect.getdoc(getattr(lora_export, function)) or "").partition("\n\nOptions:\n")[0]
        lines += ["## In Python", _fenced("python", _signature(f"lora_export.{function}", keywords)), _prose(prose)]
    return "\n\n".join(lines) + "\n"


def _function_of(command: str) -> str:
    """The public function of a command; empty where it has none."""
    return next((name for name in (command, f"export_{command}") if name in lora_export.__all__), "")


def _options(command: click.Command, keywords: Keywords) -> Iterator[str]:
    """A table for each section of `--help`."""
    rows: dict[str, list[str]] = {}
    for param in command.params:
        if isinstance(param, click.Option) and not set(OF_ALL) & {str(param.name), str(param.name)[3:]}:
            rows.setdefault(str(getattr(param, "section", "Options")), []).append(_option_row(param, keywords))
    for section, lines in sorted(rows.items(), key=lambda one: list(Section).index(Section(one[0]))):
        if section != Section.OPTIONS:
            yield f"### {section}"
        yield "\n".join(["| option | in Python | |", "|---|---|---|", *lines])
    yield "`--quiet`, `--verbose` and `--help` are options of every command, and `--json` of all but `guide`."


def _option_row(param: click.Option, keywords: Keywords) -> str:
    name = str(param.name)
    record = name.partition("_")[0]
    keyword = next((one for one in (name, name.removeprefix("no_"), record) if one in keywords), "")
    flags = " ".join(f"`{flag}`" for flag in (*param.opts, *param.secondary_opts))
    choices = " ".join(f"`{one}`" for one in param.type.choices) if isinstance(param.type, click.Choice) else ""
    default = param.default if isinstance(param.default, str | int | float) and not param.is_flag else ""
    notes = [
        _cell(param.help or ""),
        choices and f"One of {choices}.",
        f"Default: `{default}`." if default != "" else "",
    ]
    return f"| {flags} | {f'`{keyword}`' if keyword else ''} | {' '.join(filter(None, notes))} |"


def _part(name: str, value: Any) -> Iterator[str]:
    yield f"## {name}"
    yield _fenced("python", _signature(name, inspect.signature(value).parameters))
    yield _prose(inspect.getdoc(value) or "")
    if not inspect.isclass(value):
        return
    for member, found in vars(value).items():
        text = inspect.getdoc(getattr(value, member))
        if member.startswith("_") or not text or not (inspect.isfunction(found) or isinstance(found, property)):
            continue
        arguments = inspect.signature(found).parameters if inspect.isfunction(found) else {}
        shown = _signature(member, dict(list(arguments.items())[1:])) if inspect.isfunction(found) else member
        yield f"**`{' '.join(shown.split())}`**"
        yield _prose(text)


def _signature(name: str, keywords: Keywords) -> str:
    """A call with every parameter, one a line where they are many."""
    parameters = [_parameter(one) for one in keywords.values()]
    kinds = [one.kind for one in keywords.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    one_line = f"{name}({', '.join(parameters)})"
    return one_line if len(one_line) <= 88 else f"{name}(\n    {f',{chr(10)}    '.join(parameters)},\n)"


def _parameter(one: inspect.Parameter) -> str:
    """A parameter with its type and its default, as short as they can be read."""
    kind = one.annotation if isinstance(one.annotation, str) else inspect.formatannotation(one.annotation)
    if re.fullmatch(r"<.*>|mappingproxy.*", shown := repr(one.default)):
        shown = "..."  # made for each call, or a function that does nothing
    default = "" if one.default is one.empty else f" = {shown}"
    stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    shown_kind = "" if one.annotation is one.empty else ": " + BEGINNING.sub("", kind)
    return f"{stars}{one.name}{shown_kind}{default}"


def _prose(docstring: str) -> str:
    """A docstring as Markdown: its indented blocks are Python."""
    parts = re.split(r"\n\n", docstring)
    return "\n\n".join(
        _fenced("python", textwrap.dedent(part)) if part.startswith("    ") else _cell(part, newline="\n")
        for part in parts
        if part.strip()
    )


def _cell(text: str, newline: str = " ") -> str:
    """Text of a docstring or of `--help` in Markdown: what it would take for marks stays as it is."""
    marks = {"|": "\\|", "*": "\\*", "<": "&lt;"}
    escaped = re.sub(r"(`[^`]+`)|([|*<])", lambda found: found[1] or marks[found[2]], text)
    return newline.join(line.strip() for line in escaped.splitlines())


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```" if text.strip() else ""
