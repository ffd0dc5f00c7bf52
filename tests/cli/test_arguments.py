"""Options that several commands share: how they are read, refused, and given again."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from lora_export.cli import COMMANDS, cli, command_named
from lora_export.cli.arguments import Command, command_line, options_by_name, wrote
from lora_export.cli.parameters import other_tools
from lora_export.errors import WrongUsage
from lora_export.options.common import LORA_MODES
from support.cli import call
from support.handmade import base_file, peft_adapter
from support.pages import blocks


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
        ("verify", "merged", "--base", "base", "--no-strict", "--enable-lora", "qkv=1,0,1"),
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
    assert mode.help and mode.help.startswith(f"merged: {LORA_MODES['merged']}; nodes: {LORA_MODES['nodes']}. inputs: ")
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


# --- Defaults from pyproject.toml and from the environment, and shell completion. ---


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and an adapter, in a folder below that of a pyproject.toml, which is the root of a repository."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    base_file(tmp_path / "sub/base.safetensors", {"fc.weight": W})
    peft_adapter(tmp_path / "sub/adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    monkeypatch.chdir(tmp_path / "sub")
    return tmp_path


W = np.arange(6).reshape(2, 3)
MERGE = ("merge", "base.safetensors", "adapter", "-o", "merged.safetensors", "--overwrite")


def configure(place: Path, text: str) -> None:
    (place / "pyproject.toml").write_text(text)


def merged_with(*words: str) -> dict[str, object]:
    """The settings and hashes of a merge, from the record in its file."""
    from lora_export.artifacts.artifact import open_artifact

    assert call(*MERGE, *words) == 0
    return dict(open_artifact(Path("merged.safetensors")).record.content)


def test_a_table_gives_defaults_and_the_command_line_counts_first(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(place, '[tool.lora-export]\nhash = "sha256"\n[tool.lora-export.merge]\nmin_retention = 0.25\n')
    record = merged_with()
    assert list(record["base"]["base.safetensors"]) == ["sha256"]  # type: ignore[index]
    assert record["settings"]["min_retention"] == 0.25  # type: ignore[index]
    note = f"note: from {place / 'pyproject.toml'}: min-retention = 0.25, hash = sha256"
    assert note in capsys.readouterr().err.splitlines()
    monkeypatch.setenv("LORA_EXPORT_MERGE_MIN_RETENTION", "0.75")
    assert merged_with()["settings"]["min_retention"] == 0.75  # type: ignore[index]
    assert merged_with("--min-retention", "0.5")["settings"]["min_retention"] == 0.5  # type: ignore[index]


def test_the_nearest_table_counts_and_a_file_without_one_does_not(place: Path) -> None:
    configure(place, '[tool.lora-export]\nhash = "sha256"\n')
    (place / "sub/pyproject.toml").write_text('[tool.other]\nhash = "x"\n[project]\nname = "lora-export-user"\n')
    assert list(merged_with()["base"]["base.safetensors"]) == ["sha256"]  # type: ignore[index]
    (place / "sub/pyproject.toml").write_text('[tool.lora-export]\nhash = "xxh3_128"\n')
    assert list(merged_with()["base"]["base.safetensors"]) == ["xxh3_128"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[tool.lora-export]\nhsah = "sha256"\n',
            "[tool.lora-export] has the key `hsah`, which is no option; the nearest is `hash`",
        ),
        (
            "[tool.lora-export.merge]\nmin_retension = 1\n",
            "the key `min_retension`, which is no option; the nearest is `min-retention`",
        ),
        ('[tool.lora-export.merg]\nhash = "sha256"\n', "the key `merg`, which is no option; the nearest is `merge`"),
        ("[tool.lora-export]\nhelp = true\n", "the key `help`, which is no option"),
        ("[tool]\nlora-export = 3\n", "tool.lora-export is not a table"),
        ("[tool.lora-export]\nmerge = 3\n", "tool.lora-export.merge is not a table"),
        ("[tool.lora-export\n", "is not valid TOML"),
        ('[tool.lora-export]\nhash = "md5"\n', "'md5' is not one of 'xxh3_128', 'sha256'; it is set in /"),
        ("[tool.lora-export]\nhash = 5\n", "`hash` is 5; it must be choice"),
        ("[tool.lora-export]\nmin-retention = [1]\n", "`min-retention` is [1]; it must be float range"),
        ('[tool.lora-export]\noverwrite = "yes"\n', "`overwrite` is 'yes'; it must be true or false"),
        ("[tool.lora-export]\nlayout = [5]\n", "`layout` is [5]; it must be text"),
        ("[tool.lora-export]\njobs = 1.9\n", "`jobs` is 1.9; it must be integer range"),
    ],
)
def test_a_wrong_table_is_a_usage_error_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    configure(place, text)
    assert call(*MERGE) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("merged.safetensors").exists()


def test_a_folder_above_that_may_not_be_searched_has_no_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(place, "[tool.lora-export\n")
    stat = os.stat

    def refused(path: Any, *arguments: Any, **keywords: Any) -> os.stat_result:
        if os.fspath(path) == str(place / "pyproject.toml"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **keywords)

    monkeypatch.setattr(os, "stat", refused)
    assert call(*MERGE) == 0


def test_options_of_other_commands_are_no_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(place, '[tool.lora-export]\nprovider = "cpu"\n[tool.lora-export.verify]\nreport = "v.json"\n')
    assert call("inspect", "adapter") == 0
    assert capsys.readouterr().err == ""


def test_a_report_has_the_options_from_everywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(*MERGE) == 0
    configure(place, '[tool.lora-export.verify]\nreport = "v.json"\nquiet = true\nallow-pickle = false\n')
    monkeypatch.setenv("LORA_EXPORT_VERIFY_BASE", "base.safetensors")
    assert call("verify", "merged.safetensors", "-a", "adapter") == 0
    words = json.loads(Path("v.json").read_text())["about"]["command"]
    assert words[:3] == ["lora-export", "verify", "merged.safetensors"]
    pairs = [("--adapter", "adapter"), ("--base", "base.safetensors"), ("--report", "v.json")]
    assert sorted(zip(words[3::2], words[4::2], strict=True)) == pairs


FACTORY, RUNNER = 'model = "evil.py:make"\n', 'runner = "evil.py:run"\n'
REPORT = 'report = "v.json"\n'


@pytest.mark.parametrize(
    ("text", "is_root", "is_mine", "why"),
    [
        (REPORT, False, True, "`report` of {} is left out: the file is neither in the current folder nor in the root"),
        (REPORT, True, False, "`report` of {} is left out: the file belongs to another user"),
        (FACTORY, True, True, "`model` of {} is left out: code is named by a file in the current folder alone"),
        (FACTORY, True, False, "`model` of {} is left out: the file belongs to another user"),
        (RUNNER, True, True, "`runner` of {} is left out: code is named by a file in the current folder alone"),
        (RUNNER, True, False, "`runner` of {} is left out: the file belongs to another user"),
    ],
)
def test_a_file_that_was_found_runs_no_code_and_names_no_output(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text, is_root, is_mine, why
) -> None:
    assert call(*MERGE) == 0
    configure(place, f"[tool.lora-export.verify]\nstrict = true\n{text}")
    Path("evil.py").write_text("raise SystemExit('ran')\n")
    if not is_root:
        (place / ".git").rmdir()
    if not is_mine:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    capsys.readouterr()
    assert call("verify", "merged.safetensors", "-a", "adapter", "--base", "base.safetensors") == 0
    note = f"note: {why.format(place / 'pyproject.toml')}"
    printed = capsys.readouterr().err.splitlines()
    assert any(line.startswith(note) and line.endswith("Give it on the command line") for line in printed), printed
    assert f"note: from {place / 'pyproject.toml'}: strict = True" in printed  # what is harmless is taken
    assert not Path("v.json").exists()


def test_a_file_that_was_found_names_no_cluster_and_signs_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(place, '[tool.lora-export.merge]\nray = "ray://elsewhere:10001"\nsign = "sigstore"\n')
    (place / ".git").rmdir()
    assert call(*MERGE) == 0
    printed = capsys.readouterr().err
    assert all(f"`{key}` of {place / 'pyproject.toml'} is left out" in printed for key in ("ray", "sign"))


def test_a_file_in_the_current_folder_names_outputs_and_models(place: Path) -> None:
    assert call(*MERGE) == 0
    configure(place / "sub", f"[tool.lora-export.verify]\n{REPORT}")
    assert call("verify", "merged.safetensors", "-a", "adapter", "--base", "base.safetensors") == 0
    assert Path("v.json").exists()
    configure(place / "sub", f"[tool.lora-export.verify]\n{FACTORY}")
    Path("evil.py").write_text("raise RuntimeError('ran')\n")
    assert call("verify", "merged.safetensors", "-a", "adapter") == 3


def test_environment_sets_flags_lists_and_verbosity(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*MERGE) == 0
    monkeypatch.setenv("LORA_EXPORT_VERIFY_REPORT", "a.json:b.xml")
    monkeypatch.setenv("LORA_EXPORT_VERIFY_JSON", "1")
    monkeypatch.setenv("LORA_EXPORT_INSPECT_VERBOSE", "1")
    capsys.readouterr()
    assert call("verify", "merged.safetensors", "--base", "base.safetensors", "-a", "adapter") == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "same"
    assert Path("a.json").exists() and Path("b.xml").exists()
    assert call("inspect", "adapter") == 0
    assert "module  rank" in capsys.readouterr().out
    assert call("inspect", "adapter", "-q") == 0  # the command line counts more
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("MERGE_MIN_RETENTIN", "the variable LORA_EXPORT_MERGE_MIN_RETENTIN names no option; the nearest is `LORA_EXP"),
        ("MERGE__HELP", "the variable LORA_EXPORT_MERGE__HELP names no option"),
        (
            "MERGE_AS_JSON",
            "the variable LORA_EXPORT_MERGE_AS_JSON names no option; the nearest is `LORA_EX",
        ),
        (
            "MERGE_DTYPE",
            "'1' is not one of 'keep', 'float32', 'bfloat16', 'float16'; it is set by the variable L",
        ),
        ("MERGE_LAYOUT", "1 is not NAME=out_in or NAME=in_out; it is set by the variable LORA_EXPORT_MERGE_LAYOUT"),
    ],
)
def test_a_wrong_variable_is_a_usage_error_that_names_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, message: str
) -> None:
    monkeypatch.setenv(f"LORA_EXPORT_{variable}", "1")
    assert call(*MERGE) == 2
    assert message in capsys.readouterr().err
    assert not Path("merged.safetensors").exists()


@pytest.mark.parametrize("value", ["1", "2.0.1", ""])
def test_a_variable_without_a_command_is_no_option(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("LORA_EXPORT_VERSION", value)
    monkeypatch.setenv("LORA_EXPORT_DTYPE", value)
    assert call(*MERGE) == 0 and Path("merged.safetensors").exists()
    note = "note: the variable LORA_EXPORT_DTYPE sets no option: LORA_EXPORT_MERGE_DTYPE does\n"
    assert capsys.readouterr().err == (note if value else "")


@pytest.mark.parametrize("key", ["method", "combine"])
def test_every_long_spelling_of_an_option_is_a_key_and_a_variable(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    configure(place, f'[tool.lora-export.combine]\n{key} = "dare_linear"\n')
    assert call("combine", "adapter", "-o", "both") == 2
    assert "--combine dare_linear needs --density" in capsys.readouterr().err
    monkeypatch.setenv(f"LORA_EXPORT_COMBINE_{key.upper()}", "ties")
    assert call("combine", "adapter", "-o", "both") == 2
    assert "--combine ties needs --density" in capsys.readouterr().err


def test_help_is_shown_beside_a_wrong_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(place, "[tool.lora-export.merge]\nmin-retension = 1\n")
    assert call("merge", "--help", "all") == 0
    assert "--min-retention" in capsys.readouterr().out


def test_the_table_of_the_guide_is_valid(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = [block.text for block in blocks("configuration") if block.language == "toml"]
    configure(place, text)
    assert merged_with()["settings"]["min_retention"] == 0.8  # type: ignore[index]
    tables = tomllib.loads(text)["tool"]["lora-export"]
    for name in COMMANDS:
        assert set(tables.get(name, {})) <= set(options_by_name(command_named(name)))


@pytest.mark.parametrize(
    ("words", "number", "expected"),
    [
        ("lora-export me", 1, "plain,merge"),
        ("lora-export merge --min", 2, "plain,--min-retention"),
        ("lora-export merge --hash ", 3, "plain,sha256"),
        ("lora-export verify --model ba", 3, "file,ba"),
        ("lora-export verify x -a ad", 4, "file,ad"),
        ("lora-export onnx ba", 2, "file,ba"),
    ],
)
def test_the_shell_completes(
    words: str, number: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(number), "_LORA_EXPORT_COMPLETE": "bash_complete"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        call()
    assert expected in capsys.readouterr().out.splitlines()


def test_the_shell_gets_its_script() -> None:
    program = "import os; os.environ['_LORA_EXPORT_COMPLETE'] = 'zsh_source'; from lora_export.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "#compdef lora-export" in done.stdout


# --- Misspelled options and those of other tools are answered with the right one. ---


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


@pytest.mark.parametrize("name", other_tools()["options"])
def test_every_suggestion_is_an_option_of_a_command(name: str) -> None:
    assert any(f"--{name}" in options for options in OPTIONS.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_no_foreign_name_hides_an_option_of_the_command(command: str) -> None:
    for name, others in other_tools()["options"].items():
        assert f"--{name}" not in others and all(other.startswith("-") for other in others)
    assert all(name.startswith("-") for name in other_tools()["first_argument"])
    assert isinstance(command_named(command), click.Command)


@pytest.mark.parametrize(
    ("written", "end"),
    [
        ("merg", "No such command 'merg'. Did you mean merge?\n"),
        ("export", "No such command 'export'. Did you mean onnx or torchscript?\n"),
        ("tarot", "No such command 'tarot'.\n"),
    ],
)
def test_the_right_command_is_named(written: str, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(written, "x") == 2
    assert capsys.readouterr().err.endswith(f"Error: {end}")


def test_every_name_elsewhere_is_that_of_no_command_here() -> None:
    names = other_tools()["commands"]
    assert not names.keys() & COMMANDS.keys()
    assert set().union(*names.values()) <= COMMANDS.keys()


# --- --help ---


@pytest.mark.parametrize("name", ["onnx", "verify", "train", "merge"])
def test_help_of_many_options_shows_those_that_are_often_used(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    screens = {}
    for words in (("--help",), ("-h",), ("--help", "all"), ("-h", "all")):
        assert call(name, *words) == 0
        screens[words] = capsys.readouterr().out
    short, everything = screens["--help",], screens["--help", "all"]
    assert short == screens["-h",] and everything == screens["-h", "all"]
    flags = [f"--{flag}" for flag in options_by_name(command_named(name))]
    shown = {flag for flag in flags if re.search(rf"^  (-\w, )?{flag}(?![\w-])", short, re.M)}
    assert 10 <= len(shown) <= 20 and "--format" not in shown
    assert f"\n{len(flags) - len(shown)} more options: lora-export {name} --help all\n" in short
    assert [flag for flag in flags if not re.search(rf"^  (-\w, )?{flag}(?![\w-])", everything, re.M)] == []
    assert "more options" not in everything


def test_help_of_few_options_shows_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", "--help") == 0
    assert "more options" not in capsys.readouterr().out
