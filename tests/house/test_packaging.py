"""What a user installs: the wheel, in an almost empty environment; and what `make` installs."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lora_export import __version__
from lora_export.cli.guide import TOPICS
from support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Below these a model file can run code or read what it should not; onnxruntime's is for the proof of placement.
SECURITY_FLOORS = {"torch": "2.10", "transformers": "5.3", "onnx": "1.21", "onnxruntime": "1.24"}


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without access to this checkout or to the packages of this interpreter."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAKE", "MFLAGS"))
    }
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def run_well(*command: str | Path, cwd: Path | None = None) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the wheel ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, so that the archive is tested too."""
    out = tmp_path_factory.mktemp("dist")
    run_well(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The programs of a fresh environment: the wheel alone, and what the command line itself needs."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet")
    run_well(*pip, "--no-deps", wheel)
    run_well(
        *pip, *(line for line in PROJECT["dependencies"] if Requirement(line).name in ("click", "packaging", "rich"))
    )
    yield programs


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "lora_export").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    ours = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"lora_export/py.typed", *(f"lora_export/guide/{topic}.md" for topic in TOPICS)} <= ours <= names
    assert {name.partition("/")[0] for name in names} == {"lora_export", f"lora_export-{__version__}.dist-info"}


def test_the_wheel_has_version_licence_and_readme(wheel):
    info = f"lora_export-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    assert (metadata["Version"], metadata["License-Expression"]) == (__version__, "Apache-2.0")
    assert licence == (ROOT / "LICENSE").read_text() and "Apache License" in licence
    assert "# lora-export" in metadata.get_payload()


@pytest.mark.parametrize("command", [["lora-export"], ["python", "-m", "lora_export"]])
def test_help_and_version_work_in_a_bare_environment(command, bare):
    program, *arguments = command
    assert "Usage: lora-export" in run_well(bare / program, *arguments, "--help", cwd=bare)
    assert run_well(bare / program, *arguments, "--version", cwd=bare) == f"lora-export, version {__version__}\n"


def test_the_doctor_lists_what_a_bare_environment_lacks(bare):
    done = run(bare / "lora-export", "doctor", cwd=bare)
    assert done.returncode == 6, done.stdout + done.stderr
    lacking = {line.split(" ")[1] for line in done.stdout.splitlines() if line.endswith("is not installed")}
    wanted = {Requirement(line) for line in PROJECT["dependencies"]}
    here = {each.name.replace("_", "-") for each in wanted if each.marker is None or each.marker.evaluate()}
    assert lacking == here - {"click", "packaging", "rich"}


# --- the project file ---


def test_the_version_is_written_once():
    files = [ROOT / "pyproject.toml", *(ROOT / "lora_export").rglob("*.py")]
    assert [path.name for path in files if f'"{__version__}"' in path.read_text()] == ["__init__.py"]


def test_the_changelog_has_this_version():
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_requirement_admits_an_insecure_version():
    lines = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, lines):
        floor = SECURITY_FLOORS.get(requirement.name.removesuffix("-gpu"))
        if floor is not None:
            just_below = f"{floor.rpartition('.')[0]}.{int(floor.rpartition('.')[2]) - 1}.99"
            assert not requirement.specifier.contains(just_below), f"{requirement} admits {just_below}"


def test_every_requirement_has_a_floor_and_none_is_pinned():
    lines = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, lines):
        operators = {each.operator for each in requirement.specifier}
        assert requirement.name == "lora-export" or ">=" in operators, f"{requirement} has no floor"
        assert "==" not in operators and "===" not in operators, f"{requirement} is pinned"


# --- make ---

PYTHON_THAT_LOGS = f"""#!{sys.executable}
import os, pathlib, shutil, sys
sys.version_info = (3, int(os.environ.get("MINOR", 11)), 0)
with open("log", "a") as log:
    print(*sys.argv[1:], file=log)
if sys.argv[1] == "-V":
    print(f"Python 3.{{sys.version_info[1]}}.0")
if sys.argv[1] == "-c":
    exec(sys.argv[2])
if sys.argv[1:3] == ["-m", "venv"]:
    pathlib.Path(sys.argv[3], "bin").mkdir(parents=True)
    shutil.copy(__file__, sys.argv[3] + "/bin/python")
if sys.argv[1:3] == ["-m", "pip"]:
    sys.exit(os.environ.get("PIP"))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh clone, and a python that logs its arguments instead of running them."""
    for name in ("pyproject.toml", "Makefile"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "python").write_text(PYTHON_THAT_LOGS)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def logged(checkout: Path) -> list[str]:
    """The arguments of the python since the last call."""
    lines = (checkout / "log").read_text().splitlines()
    (checkout / "log").unlink()
    return lines


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = [f"{name}={value}" for name, value in environment.items()]
    return run("env", *settings, "make", "PYTHON=./python", *arguments, cwd=checkout)


@pytest.mark.parametrize(
    ("target", "extra", "works"),
    [
        ("test", "dev", "-m pytest -n auto --maxprocesses 8 --dist worksteal -m not slow and not soak"),
        ("test-slow", "dev", "-m pytest -n auto --maxprocesses 8 --dist worksteal -m slow and not soak"),
        ("soak", "dev", "-m pytest -s -m soak"),
        ("demo", "demo", "samples/demo.py"),
    ],
)
def test_make_installs_once_and_again_when_pyproject_changes(target, extra, works, checkout):
    install = f"-m pip install --disable-pip-version-check -e .[{extra}]"
    assert make(checkout, target).returncode == 0
    assert logged(checkout)[1:] == ["-m venv .venv", install, works]
    assert make(checkout, target).returncode == 0
    assert logged(checkout) == [works]
    later = (checkout / "pyproject.toml").stat().st_mtime + 60
    os.utime(checkout / "pyproject.toml", (later, later))
    assert make(checkout, target).returncode == 0
    assert logged(checkout) == [install, works]


def test_make_repeats_a_failed_installation(checkout):
    assert make(checkout, "test", PIP="no network").returncode != 0
    assert logged(checkout)[-1].startswith("-m pip install")
    assert make(checkout, "test").returncode == 0
    assert [line.split(" ")[1] for line in logged(checkout)] == ["pip", "pytest"]


def test_make_reports_which_python_it_needs(checkout):
    old = make(checkout, "test", MINOR="10")
    assert old.returncode != 0 and "needs Python 3.11 or newer" in old.stderr and "Python 3.10.0" in old.stderr
    absent = make(checkout, "test", "PYTHON=no-such-python")
    assert absent.returncode != 0 and "there is no no-such-python here" in absent.stderr
    assert not list(checkout.glob(".venv/*.stamp"))
