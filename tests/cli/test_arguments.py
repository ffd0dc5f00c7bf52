"""Options that several commands share: how they are read, refused, and given again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from lora_export.cli import COMMANDS, cli
from lora_export.cli.arguments import Command, command_line, wrote
from lora_export.errors import WrongUsage
from lora_export.options.common import LORA_MODES


def command_of(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def read(name: str, *words: str) -> dict[str, Any]:
    """The parameters of a command line. Nothing is run."""
    return command_of(name).make_context(name, list(words)).params


def given_again(name: str, *words: str) -> list[str]:
    with command_of(name).make_context(name, list(words)):
        return command_line()


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "m.onnx", "--model", "base", "--adapter", "fr=./fr", "--adapter", "de", "--weight", "0.5"),
        ("verify", "merged", "--base", "base", "--layout", "a=in_out", "--layout", "*=out_in", "--json"),
        ("verify", "m.onnx", "--model", "base", "--report", "a name.html", "--fixed", "sequence=128"),
        ("onnx", "base", "--output", "m.onnx", "--lora", "nodes", "--no-verify", "--overwrite"),
        ("verify", "merged", "--base", "base", "--prefix", "model.=m.", "--prefix", "=x."),
    ],
)
def test_a_command_line_can_be_given_again(words: tuple[str, ...]) -> None:
    name, *arguments = words
    line = given_again(name, *arguments)
    assert line[:2] == ["lora-export", name]
    assert read(name, *line[2:]) == read(name, *arguments)
    assert sorted(line[2:]) == sorted(arguments), shlex.join(line)


def test_defaults_are_left_out_when_it_is_given_again() -> None:
    assert given_again("onnx", "base", "-o", "m.onnx") == ["lora-export", "onnx", "base", "--output", "m.onnx"]


def test_the_last_of_equal_layouts_counts_and_comes_last() -> None:
    layouts = read("verify", "m", "--base", "b", "--layout", "a=in_out", "--layout", "b=out_in", "--layout", "a=out_in")
    assert list(layouts["layout"].items()) == [("b", "out_in"), ("a", "out_in")]
    assert read("verify", "m", "--base", "b", "--layout", "odd=name=in_out")["layout"] == {"odd=name": "in_out"}


@pytest.mark.parametrize("command", ["merge", "onnx", "torchscript", "verify"])
def test_prefixes_are_read_as_a_table(command):
    words = {"merge": ("base", "a", "-o", "o"), "verify": ("m", "--base", "b")}.get(command, ("base", "-o", "o"))
    read_prefixes = read(command, *words, "--prefix", "model.=model.language_model.", "--prefix", "=a=b")["prefixes"]
    assert read_prefixes == {"model.": "model.language_model.", "": "a=b"}


@pytest.mark.parametrize("texts", [["model."], ["a=a"], ["a=b", "a=c"]])
def test_a_prefix_that_replaces_nothing_is_refused(texts):
    with pytest.raises(click.BadParameter):
        read("merge", "base", "a", "-o", "o", *(word for text in texts for word in ("--prefix", text)))


@pytest.mark.parametrize("text", ["a", "a=", "=in_out", "a=conv"])
def test_a_layout_without_name_or_kind_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"{text} is not NAME=out_in or NAME=in_out"):
        read("verify", "m", "--base", "b", "--layout", text)


@pytest.mark.parametrize("text", ["sequence", "sequence=", "=3", "sequence=0", "sequence=-1", "sequence=x"])
def test_a_fixed_axis_needs_a_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"{text} is not AXIS=SIZE, such as sequence=128"):
        read("verify", "m", "--model", "b", "--fixed", text)
    assert read("verify", "m", "--model", "b", "--fixed", "batch=2")["fixed"] == {"batch": 2}


@pytest.mark.parametrize("name", ["onnx", "torchscript", "verify"])
def test_an_adapter_as_an_argument_is_refused_with_its_option(name: str) -> None:
    with pytest.raises(click.UsageError, match=r"unexpected argument fr\. An adapter is given by -a: -a fr"):
        read(name, "m", "fr", *(("-o", "out") if name != "verify" else ()))


def test_usage_that_a_function_refuses_is_shown_as_click_shows_it() -> None:
    @click.command(cls=Command)
    def refused() -> None:
        raise WrongUsage("--a and --b do not go together")

    with pytest.raises(click.UsageError, match="--a and --b do not go together") as error:
        refused.main([], standalone_mode=False)
    assert error.value.ctx is not None and error.value.exit_code == 2


def test_a_command_offers_the_modes_that_it_has() -> None:
    (mode,) = (parameter for parameter in command_of("torchscript").params if parameter.name == "lora")
    assert isinstance(mode, click.Option) and mode.default == "merged"
    assert mode.help == f"merged: {LORA_MODES['merged']}; nodes: {LORA_MODES['nodes']}."
    with pytest.raises(click.BadParameter):
        read("torchscript", "base", "-o", "o", "--lora", "rows")


def test_what_was_written_is_told_with_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m\n.bin"
    path.write_bytes(bytes(1234))
    wrote(path, ": an adapter")
    assert capsys.readouterr().out == f"wrote {tmp_path}/m\\n.bin (1,234 bytes): an adapter\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_has_an_option_twice(name: str) -> None:
    parameters = command_of(name).params
    spelled = [spelling for parameter in parameters for spelling in (*parameter.opts, *parameter.secondary_opts)]
    assert sorted(spelled) == sorted(set(spelled))
