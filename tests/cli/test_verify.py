"""`lora-export verify`: reports, options without meaning, and what is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support import junit_schema
from support.audits import plain, run, the_base, verified


def test_reports_contain_every_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, out = the_base(tmp_path / "base.safetensors"), plain(tmp_path / "ad"), tmp_path / "m.safetensors"
    assert run("merge", base, adapter, "-o", out) == 0
    tensors = load_file(out) | {"kept.bias": np.ones(16, np.float32)}
    save_file(tensors, out)
    files = tmp_path / "r.json", tmp_path / "r.xml", tmp_path / "r.html"
    options = [part for file in files for part in ("--report", file)]
    code, document = verified(capsys, out, base, adapter, more=tuple(options))
    assert code == 4 and json.loads(files[0].read_text()) == document
    junit = ElementTree.fromstring(files[1].read_text())
    assert junit_schema.faults(junit) == []
    suite = junit.find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == (str(len(tensors) + 1), "2")  # and the verdict
    failed = [test.get("name") for test in suite.findall("testcase") if test.find("failure") is not None]
    assert failed == ["kept.bias", "same"]
    assert "1 of 16 entries" not in files[2].read_text() and "16 of 16 entries are not the base" in files[2].read_text()


@pytest.mark.parametrize(
    "options",
    [["--base", "base.safetensors"], [], ["--base", "base.safetensors", "--model", "base", "-a", "ad"],
     ["--base", "base.safetensors", "-a", "ad", "--atol", "1"],
     ["--base", "base.safetensors", "-a", "ad", "--adapter-id", "0"]],
)  # fmt: skip
def test_options_without_meaning_here_are_usage_errors(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    the_base(tmp_path / "base.safetensors")
    the_base(tmp_path / "m.safetensors")
    plain(tmp_path / "ad")
    assert run("verify", "m.safetensors", *options) == 2


def test_neither_pytorch_nor_onnx_is_imported(tmp_path: Path) -> None:
    base, adapter, out = the_base(tmp_path / "base.safetensors"), plain(tmp_path / "ad"), tmp_path / "m.safetensors"
    assert run("merge", base, adapter, "-o", out) == 0
    program = (
        "import sys; from lora_export import cli; code = cli.run(sys.argv[1:]);"
        "sys.exit(code or sum(name in sys.modules for name in ('torch', 'onnx', 'onnxruntime', 'transformers')))"
    )
    line = [sys.executable, "-c", program, "verify", str(out), "--base", str(base), "-a", str(adapter)]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("environment", "options", "code"),
    [
        ({}, (), 0),
        ({}, ("--strict",), 5),
        ({"CI": "true"}, (), 5),
        ({"CI": "true"}, ("--no-strict",), 0),
        ({"CI": "false"}, (), 0),
    ],
)
def test_part_that_was_not_judged_is_undecided_where_strict(
    environment: dict[str, str],
    options: tuple[str, ...],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter, out = tmp_path / "base", plain(tmp_path / "ad"), tmp_path / "merged"
    base.mkdir()
    the_base(base / "model.safetensors")
    assert run("merge", base, adapter, "-o", out) == 0
    (base / "config.json").write_text('{"hidden_size": 16, "extra": 1}')
    (out / "config.json").write_text('{"hidden_size": 16}')
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert run("verify", out, "--base", base, "-a", adapter, *options) == code
    shown = capsys.readouterr().out
    assert shown.startswith("undecided: " if code else "same: ")
    assert "not judged: values in config.json that only one folder has: extra" in shown
