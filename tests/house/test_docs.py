"""What the README says is so: commands, options, exit codes, make targets, Python names, links."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys

import click
import pytest

import lora_export
from lora_export.cli import COMMANDS
from lora_export.errors import LoraExportError
from support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)  # (language, text)
SHELL = "".join(text for language, text in BLOCKS if language == "sh")
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))

SHOWN = [line for line in SHELL.replace("\\\n", " ").splitlines() if line.startswith("lora-export ")]
SHOWN += [span for span in SPANS if span.startswith("lora-export ")]


def command_of(name: str) -> click.Command:
    command: click.Command = importlib.import_module(f"lora_export.cli.{name}").command
    return command


def options_of(name: str) -> list[click.Option]:
    return [parameter for parameter in command_of(name).params if isinstance(parameter, click.Option)]


def exit_codes(error: type[LoraExportError] = LoraExportError) -> set[int]:
    return {error.exit_code}.union(*map(exit_codes, error.__subclasses__()))


# --- every command and code is documented ---


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_row_in_the_readme(name):
    assert re.search(rf"^\| `lora-export {name}\b[^`]*` \| \S", README, re.M)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_is_explained_by_its_help(name):
    assert command_of(name).help
    unexplained = [option.opts for option in options_of(name) if not option.help or option.hidden]
    assert unexplained == []


def test_the_table_of_exit_codes_is_complete_and_lists_no_other():
    documented = re.findall(r"^\| (\d+) \| \S", README, re.M)
    assert sorted(map(int, documented)) == sorted({0, 2} | exit_codes())


# --- nothing is documented that does not exist ---


@pytest.mark.parametrize("line", SHOWN)
def test_every_command_line_in_the_readme_is_understood(line):
    _, name, *arguments = shlex.split(line, comments=True)
    assert name in COMMANDS
    command_of(name).make_context(name, arguments)  # raises click's UsageError for what it does not know


def test_command_lines_were_found_in_the_readme():
    assert {line.split()[1] for line in SHOWN} == set(COMMANDS)


def test_every_option_that_the_readme_names_exists():
    named = {word for span in SPANS for word in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)}
    known = {spelling for name in COMMANDS for option in options_of(name) for spelling in option.opts}
    assert "--json" in named and named <= known | {"--help", "--version"}


def test_the_python_in_the_readme_uses_names_that_exist():
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert blocks
    for text in blocks:
        linter = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F821", "-"]
        checked = subprocess.run(linter, input=text, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
        for name in re.findall(r"\ble\.(\w+)", text):
            assert hasattr(lora_export, name), name


def test_every_link_within_the_repository_leads_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README) if "://" not in target]
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


# --- the two commands of a newcomer ---


def test_the_readme_shows_make_demo_and_make_test_and_only_targets_that_exist():
    shown = {match for _, text in BLOCKS for match in re.findall(r"^make ([a-z-]+)", text, re.M)}
    shown |= {span.removeprefix("make ") for span in SPANS if span.startswith("make ")}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test"} <= shown <= set(targets)


def test_ci_runs_the_readme_s_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in SHELL.splitlines() and script.read_text().splitlines()[-1] == "make test"
