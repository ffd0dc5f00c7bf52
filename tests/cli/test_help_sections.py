"""The sections of `--help`."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from lora_export.cli import COMMANDS, command_named
from lora_export.cli.help_sections import write_options
from lora_export.cli.parameters import SectionedOption
from lora_export.options.sections import Section

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


def test_sections_have_an_order() -> None:
    sections = {"--json": Section.OPTIONS, "--prefix": Section.READING, "--lone": Section.OPTIONS}
    sections |= {"--a": Section.DATA, "--b": Section.DATA}
    options = [SectionedOption([name], section=section, help="It.") for name, section in sections.items()]
    context, formatter = click.Context(click.Command("x")), click.HelpFormatter()
    write_options(options, context, formatter)
    lines = [line.split()[0] for line in formatter.getvalue().splitlines() if line]
    assert lines == ["Options:", "--lone", "Data:", "--a", "--b", "How", "--prefix", "Files", "--json"]
