"""Options on how adapters are applied: their spellings, and the one argument that a command gets of them."""

from __future__ import annotations

import json
from typing import Any

import click
import pytest
from click.testing import CliRunner

from lora_export.adapters.combination import Combination
from lora_export.cli import COMMANDS, cli
from lora_export.cli.application_options import combination_options, tied_option

TAKES_THEM = ("merge", "onnx", "torchscript", "verify")


@click.command()
@combination_options("--combine")
@tied_option
def command(**values: Any) -> None:
    click.echo(json.dumps(values))


def test_a_command_gets_one_combination() -> None:
    def invoked(*arguments: str) -> tuple[Combination, str]:
        values = json.loads(CliRunner().invoke(command, arguments).output)
        return Combination(**values["combination"]), values["tied"]

    chosen = invoked("--combine", "dare_ties", "--density", "0.5", "--seed", "3", "--tied", "both")
    assert chosen == (Combination("dare_ties", density=0.5, seed=3), "both")
    assert invoked() == (Combination(), "error")


@pytest.mark.parametrize("name", TAKES_THEM)
def test_commands_that_apply_adapters_take_them(name: str) -> None:
    assert name in COMMANDS
    shown = CliRunner().invoke(cli, [name, "--help"]).output
    assert all(option in shown for option in ("--combine", "--density", "--svd-rank", "--combine-seed", "--tied"))


@pytest.mark.parametrize("name", TAKES_THEM)
def test_values_that_do_not_go_together_are_wrong_usage(name: str) -> None:
    arguments = ["base", "-a", "adapter", "--density", "0.5", *(() if name == "verify" else ("-o", "out"))]
    found = CliRunner().invoke(cli, [name, *arguments])
    assert found.exit_code == 2 and "--density: --combine cat does not use it" in found.output
