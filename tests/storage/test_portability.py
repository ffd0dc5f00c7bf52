"""Everything imports, merges and publishes without the calls that only Linux has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_export import cli
from support import ROOT, TESTS
from support.folder_contents import folder_contents
from support.handmade import base_file, graph_file, peft_adapter

# These tests run a second time without Linux's calls, except those about such a call.
STORAGE = (
    *("test_atomic_output.py", "test_output_lock.py", "test_manifest.py", "test_system_calls.py"),
    *("test_safetensors_file.py", "test_json_files.py", "test_input_files.py"),
)


LINES = [
    (["merge", "base", "adapter"], "merged"),
    (["merge", "base", "adapter", "--dtype", "float16"], "merged"),  # with a new config
    (["merge", "base.onnx", "adapter"], "merged.onnx"),
    (["onnx", "base.onnx", "-a", "adapter", "--lora", "nodes"], "exported.onnx"),
]
# Each line makes a new output, and one that replaces it. Then the first one is verified, and all modules are imported.
WITHOUT_LINUX = """
import importlib, json, os, pathlib, pkgutil, sys
import lora_export
from lora_export import cli
assert sys.modules["fcntl"] is None and not hasattr(os, "preadv") and not hasattr(os, "O_DIRECTORY")
for number, (line, output) in enumerate(json.loads(sys.argv[1])):
    pathlib.Path("elsewhere", str(number)).mkdir(parents=True)
    for _ in range(2):
        assert cli.run([*line, "-o", f"elsewhere/{number}/{output}", "--overwrite"]) == 0, line
reports = "--report", "v.json", "--report", "v.xml"
assert cli.run(["verify", "elsewhere/0/merged", "--base", "base", "-a", "adapter", *reports]) == 0
for module in pkgutil.walk_packages(lora_export.__path__, "lora_export."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("all was imported")
"""


def python_without_linux(*arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, without fcntl and the other calls that only Linux has (see `support/without_linux`)."""
    paths = os.pathsep.join([str(TESTS / "support/without_linux"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    line, environment = [sys.executable, *map(str, arguments)], {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as a folder and as a graph, and an adapter for both."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("inputs")
    weights = {"fc.weight": rng.random((40, 30)), "kept": rng.random((3000, 1000))}
    (folder / "base").mkdir()
    base_file(folder / "base/model.safetensors", weights)
    (folder / "base/config.json").write_text('{"model_type": "llama"}')
    graph_file(folder / "base.onnx", {"fc.weight": np.float32(weights["fc.weight"].T)}, data="base.data")
    peft_adapter(folder / "adapter", {"fc": (rng.random((4, 30)), rng.random((40, 4)))})
    return folder


@pytest.fixture(scope="module")
def child(inputs: Path) -> subprocess.CompletedProcess[str]:
    """A process without Linux, which has made the outputs of all lines, each in a folder with the line's number."""
    return python_without_linux("-c", WITHOUT_LINUX, json.dumps(LINES), folder=inputs)


def test_every_module_imports_without_linux(child):
    assert child.returncode == 0 and child.stdout.endswith("all was imported\n"), child.stderr


@pytest.mark.parametrize("number", range(len(LINES)))
def test_an_output_without_linux_has_the_same_bytes(inputs, child, monkeypatch, number):
    monkeypatch.chdir(inputs)
    line, output = LINES[number]
    (inputs / "linux" / str(number)).mkdir(parents=True)
    assert cli.run([*line, "-o", f"linux/{number}/{output}"]) == 0
    written = folder_contents(inputs / "linux" / str(number))
    assert folder_contents(inputs / "elsewhere" / str(number)) == written, child.stderr
    assert output in {Path(name).parts[0] for name in written}


def test_reports_without_linux_have_no_other_line_ends(inputs, child):
    for name in ("v.json", "v.xml"):
        content = (inputs / name).read_bytes()
        assert content.endswith(b"\n") and b"\r" not in content, child.stderr


@pytest.mark.slow
def test_the_tests_of_storage_pass_without_linux(tmp_path):
    tests = [ROOT / "tests/storage" / name for name in STORAGE]
    options = [
        "-qs",
        "-p",
        "no:cacheprovider",
        "-k",
        "not torch and not stores_its_error",
        "--basetemp",
        tmp_path / "child",
    ]
    child = python_without_linux("-m", "pytest", *options, *tests)
    assert child.returncode == 0, child.stdout
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None and int(passed[1]) > 150, child.stdout
