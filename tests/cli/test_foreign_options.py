"""Misspelled options and those of other tools are answered with the right one."""

from __future__ import annotations

import click
import pytest

from lora_export.cli import COMMANDS, command_named
from lora_export.cli.foreign_options import ELSEWHERE, FIRST_ARGUMENT, HERE
from support.cli import call

OPTIONS = {
    name: {spelling for parameter in command_named(name).params for spelling in parameter.opts} for name in COMMANDS
}


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("merge base ad -o out --overwritte", "Did you mean '--overwrite'?"),
        ("merge base ad -o out --force", "Did you mean '--overwrite'?"),
        ("merge base --lora_path ad -o out", "Did you mean '--adapter'?"),
        ("merge base ad --save-path=out", "Did you mean '--output'?"),
        ("merge base ad -o out --strength 2", "Did you mean '--weight'?"),
        ("onnx base --device cuda -o out", "Did you mean '--provider'?"),
        ("onnx base --adapters ad -o out", "Did you mean '--adapter'?"),
        ("onnx base --output_dir out", "Did you mean '--output'?"),
        ("train base --lr 1 --data x -o out", "Did you mean '--learning-rate'?"),
        ("train base --target_modules q --data x -o out", "Did you mean '--target'?"),
        ("train base --Batch_Size 1 --data x -o out", "Did you mean '--batch-size'?"),
        ("verify x --model base --junitxml r.xml", "Did you mean '--report'?"),
        ("merge --model base ad -o out", "BASE is an argument: lora-export merge"),
        ("verify --candidate x --model base", "CANDIDATE is an argument: lora-export verify"),
        ("train --model_name_or_path base --data x -o out", "MODEL is an argument: lora-export train"),
    ],
)
def test_the_right_option_is_named(line: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*line.split()) == 2
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_suggestion_is_an_option_of_a_command(name: str) -> None:
    assert any(name in options for options in OPTIONS.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_no_foreign_name_hides_an_option_of_the_command(command: str) -> None:
    for foreign, names in HERE.items():
        assert foreign not in OPTIONS[command] or foreign not in names
    assert all(name.startswith("-") for name in FIRST_ARGUMENT)
    assert isinstance(command_named(command), click.Command)
