"""The sections of `--help`."""

from __future__ import annotations

import re
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from lora_export.cli import COMMANDS, command_named
from lora_export.cli.parameters import FilePath, SectionedOption, Source, write_options
from lora_export.options.declaring import Section
from support.cli import call
from support.handmade import base_file, peft_adapter

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
    shown = CliRunner().invoke(command, ["--help", "all"], terminal_width=200).output
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


# --- Paths on the command line: `~` is expanded wherever a path is taken, and a merge takes adapters in two ways. ---


W = np.arange(6).reshape(2, 3)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a base and an adapter, and another folder to work in."""
    (tmp_path / "home").mkdir()
    base_file(tmp_path / "home/base.safetensors", {"fc.weight": W})
    peft_adapter(tmp_path / "home/adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    "adapter", [("~/adapter",), ("-a", "~/adapter"), ("--adapter=fr=~/adapter",), ("fr=~/adapter",)]
)
def test_the_home_folder_is_expanded_in_every_place(home: Path, adapter: tuple[str, ...]) -> None:
    assert call("merge", "~/base.safetensors", *adapter, "--output=~/out/merged") == 0
    assert (home / "out/merged.safetensors").is_file()
    assert call("verify", "~/out/merged.safetensors", "--base=~/base.safetensors", "-a", "~/adapter") == 0
    assert call("inspect", "~/adapter") == 0


def test_a_file_whose_name_begins_with_a_tilde_is_itself(home: Path) -> None:
    peft_adapter(Path("~here"), {"fc": ([[1, 2, 3]], [[1], [10]])})
    assert call("merge", "~/base.safetensors", "~here", "-o", "out.safetensors") == 0
    assert Path("out.safetensors").is_file()


def test_an_unknown_user_is_a_missing_path(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", "~nobody-of-this-name/x") == 3
    assert "there is nothing at ~nobody-of-this-name/x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "given"), [("~/base.safetensors", ""), ("~/adapter", ""), ("~/adapter", "one="), ("out", "")]
)
def test_an_empty_path_is_not_the_current_folder(
    home: Path, capsys: pytest.CaptureFixture[str], place: str, given: str
) -> None:
    words = ["merge", "~/base.safetensors", "~/adapter", "-o", "" if place == "out" else "out"]
    assert call(*(given if word == place else word for word in words)) == 2
    assert "the path is empty, as an unset variable of the shell is" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_is_of_a_type_that_expands(name: str) -> None:
    for parameter in command_named(name).params:
        if isinstance(parameter.type, click.Path) or parameter.name in ("model", "reference", "adapter", "adapters"):
            assert isinstance(parameter.type, FilePath | Source), parameter.name


def test_a_merge_takes_adapters_in_one_way(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("merge", "~/base.safetensors", "-o", "out.safetensors")
    assert call(*words, "~/adapter", "-a", "~/adapter") == 2
    assert "give the adapters as arguments or by -a, not in both ways" in capsys.readouterr().err
    assert call(*words) == 2
    assert "Missing argument '[NAME=]ADAPTER...'" in capsys.readouterr().err
    peft_adapter(home / "second", {"fc": ([[4, 5, 6]], [[1], [10]])})
    assert call(*words, "-a", "a=~/adapter", "-a", "~/second", "--weight", "1", "--weight", "-2") == 0
    assert (
        load_file("out.safetensors")["fc.weight"].tolist() == (W + np.array([[-7, -8, -9], [-70, -80, -90]])).tolist()
    )
