"""Defaults from pyproject.toml and from the environment, and shell completion."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from lora_export.cli import COMMANDS, command_named
from lora_export.cli.configuration import options_by_name
from support.cli import call
from support.handmade import base_file, peft_adapter
from support.pages import blocks


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and an adapter, in a folder below that of a pyproject.toml."""
    (tmp_path / "sub").mkdir()
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
        ('[tool.lora-export]\nhash = "md5"\n', "'md5' is not one of"),
    ],
)
def test_a_wrong_table_is_a_usage_error_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    configure(place, text)
    assert call(*MERGE) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("merged.safetensors").exists()


def test_options_of_other_commands_are_no_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(place, '[tool.lora-export]\nprovider = "cpu"\n[tool.lora-export.verify]\nreport = "v.json"\n')
    assert call("inspect", "adapter") == 0
    assert capsys.readouterr().err == ""


def test_a_report_has_the_options_from_everywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(*MERGE) == 0
    configure(place, '[tool.lora-export.verify]\nreport = "v.json"\nquiet = true\n')
    monkeypatch.setenv("LORA_EXPORT_VERIFY_BASE", "base.safetensors")
    assert call("verify", "merged.safetensors", "-a", "adapter") == 0
    words = json.loads(Path("v.json").read_text())["about"]["command"]
    assert words[:3] == ["lora-export", "verify", "merged.safetensors"]
    pairs = [("--adapter", "adapter"), ("--base", "base.safetensors"), ("--report", "v.json")]
    assert sorted(zip(words[3::2], words[4::2], strict=True)) == pairs


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
def test_the_shell_completes(words: str, number: int, expected: str) -> None:
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(number), "_LORA_EXPORT_COMPLETE": "bash_complete"}
    program = f"import os; os.environ.update({environment!r}); from lora_export.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert expected in done.stdout.splitlines(), done.stderr


def test_the_shell_gets_its_script() -> None:
    program = "import os; os.environ['_LORA_EXPORT_COMPLETE'] = 'zsh_source'; from lora_export.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "#compdef lora-export" in done.stdout
