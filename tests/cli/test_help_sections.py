"""The sections of `--help`."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from lora_export.cli import COMMANDS, command_named
from lora_export.cli.help_sections import OF_NO_SECTION, SHARED, write_options

OPTION = re.compile(r"^  (?:-\w, )?(--[a-z0-9-]+)", re.MULTILINE)
HEADING = re.compile(r"^(\w.*):$", re.MULTILINE)


def options_of(command: click.Command) -> list[str]:
    context = click.Context(command, info_name="x")
    return [
        name
        for param in command.get_params(context)
        if isinstance(param, click.Option) and not param.hidden
        for name in param.opts[-1:] if name.startswith("--")
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_one_section(name: str) -> None:
    command = command_named(name)
    shown = CliRunner().invoke(command, ["--help"], terminal_width=200).output
    options = OPTION.findall(shown)
    assert len(options) == len(set(options)) == len(options_of(command))
    headings = HEADING.findall(shown)
    assert "Files and messages" in headings and len(headings) == len(set(headings))


@pytest.mark.parametrize("name", COMMANDS)
def test_sections_name_options_that_exist(name: str) -> None:
    command = command_named(name)
    names = [option for section in getattr(command, "sections", {}).values() for option in section]
    known = {option for param in command.params for option in param.opts}
    assert len(names) == len(set(names)) and set(names) <= known


def test_shared_sections_name_options_of_several_commands() -> None:
    known = [{option for param in command_named(name).params for option in param.opts} for name in COMMANDS]
    for options in SHARED.values():
        for option in options:
            assert option == "--help" or any(option in own for own in known), option


def test_own_sections_come_before_shared_ones() -> None:
    options = [click.Option([name], help="It.") for name in ("--json", "--first", "--b", "--lone", "--a", "--prefix")]
    context, formatter = click.Context(click.Command("x")), click.HelpFormatter()
    write_options(options, {"Own": ["--a", "--b"], "Other": ["--first"]}, context, formatter)
    lines = [line.split()[0] for line in formatter.getvalue().splitlines() if line]
    reading, files = ("How", "--prefix"), ("Files", "--json")
    assert lines == [f"{OF_NO_SECTION}:", "--lone", "Own:", "--b", "--a", "Other:", "--first", *reading, *files]
