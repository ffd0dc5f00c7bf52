"""The help of every command ends with examples. Each runs with the files that it names, and makes its output."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lora_export import cli
from support.page_inputs import MAKERS, PageInputs
from support.slow import slow


def commands() -> dict[str, click.Command]:
    """Every command of the command line, by name."""
    context = click.Context(cli.cli)
    found = {name: cli.cli.get_command(context, name) for name in cli.cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def examples(command: click.Command) -> list[str]:
    """The command lines below `Example:` at the end of the help."""
    _, _, lines = (command.epilog or "").partition(":\n")
    return [line.strip() for line in lines.splitlines()]


def outputs(words: list[str]) -> list[str]:
    """The files that a command line writes."""
    return [after for word, after in itertools.pairwise(words) if word in ("-o", "--report")]


def inputs(words: list[str]) -> Iterator[str]:
    """The files that a command line reads."""
    for word in words:
        name = word.rpartition("=")[2].removeprefix("./")  # `base`, `fr=./fr`
        if name in MAKERS and name not in outputs(words):
            yield name


LONG = (
    "lora-export doctor --provider cpu",
    'lora-export generate served --prompt "Once upon a time"',
    'lora-export generate served --prompt "Hello" --adapter pirate --temperature 0.7 --seed 1',
    "lora-export onnx decoder -a pirate --with-cache -o served",
    "lora-export convert de -o de.onnx_adapter --for served.onnx",
    "lora-export torchscript base -a adapter -o model.pt2",
    "lora-export verify model.onnx --model base -a adapter --report verdict.xml",
)
LINES = [(name, line) for name, command in commands().items() for line in examples(command)]


@pytest.mark.parametrize("name", commands())
def test_the_help_of_a_command_ends_with_its_examples(name: str) -> None:
    command = commands()[name]
    assert examples(command)
    help_text = command.get_help(click.Context(command, info_name=name, max_content_width=100))
    assert [line.strip() for line in help_text.splitlines()][-len(examples(command)) :] == examples(command)


@pytest.mark.parametrize(("name", "line"), [slow(*each) if each[1] in LONG else each for each in LINES])
def test_an_example_of_the_help_works(
    name: str, line: str, page_inputs: PageInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = shlex.split(line)
    assert (program, words[0]) == ("lora-export", name)
    for file in inputs(words):
        page_inputs.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.run(words) == 0
    assert [output for output in outputs(words) if not (tmp_path / output).exists()] == []
