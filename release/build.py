"""Build what is uploaded, check it, and stop before the upload: `make release`.

Two distributions have one import, `lora_export`. `lora-export-core` has the code. `lora-export` has none: it requires
the core of the same version, PyTorch, and the onnxruntime with CUDA where there is one. So both can be installed, and
no file has two owners. `lora-export-kernel` has compiled code alone, in one wheel for each platform.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CORE, FULL = "lora-export-core", "lora-export"
LARGEST_WHEEL = 3_000_000  # bytes
DOCUMENTS = runpy.run_path(str(ROOT / "release/site/published.py"))  # how they are published
SMOKE = """
import sys, numpy as np
from pathlib import Path
from safetensors.numpy import save_file
folder = Path(sys.argv[1])
(folder / "adapter").mkdir()
save_file({"up.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}, folder / "base.safetensors")
pair = {"lora_A": np.array([[1, 2, 3]], np.float32), "lora_B": np.array([[1], [10]], np.float32)}
save_file({f"base_model.model.up.{k}.weight": v for k, v in pair.items()}, folder / "adapter/adapter_model.safetensors")
(folder / "adapter/adapter_config.json").write_text(
    '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up"]}'
)
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=ROOT / "dist")
    options.add_argument("--owner", default="", help="who publishes https://github.com/OWNER/lora-export")
    options.add_argument("--no-smoke", action="store_true", help="do not install the wheels in a fresh environment")
    options.add_argument("--only-smoke", action="store_true", help="install wheels that were built already")
    chosen = options.parse_args()
    if chosen.only_smoke:
        smoke_test(chosen.out)
        return
    if not chosen.owner:
        raise SystemExit(
            "Who publishes it? The documents and the page on PyPI name the repository: make release OWNER=NAME"
        )
    shutil.rmtree(chosen.out, ignore_errors=True)
    chosen.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        for name, table in ((CORE, core_project()), (FULL, full_project())):
            table |= {"urls": urls(chosen.owner)}
            build(source_of(name, table, Path(place) / name, chosen.owner), chosen.out)
    for platform in platforms_of_kernel():
        build(ROOT / "kernel", chosen.out, "--wheel", LORA_EXPORT_KERNEL_PLATFORM=platform)
    files = sorted(chosen.out.iterdir())
    check(files)
    if not chosen.no_smoke:
        smoke_test(chosen.out)
    (chosen.out / "NOTES.md").write_text(notes(), encoding="utf-8")
    for path in files:
        print(f"{path.name}  {path.stat().st_size:,} bytes")
    print(f"The notes of {version()} are in {chosen.out / 'NOTES.md'}. Nothing was uploaded. To publish:")
    print(f"  python -m twine upload {chosen.out}/*.whl {chosen.out}/*.tar.gz")


# --- What the distributions are ---


def version() -> str:
    (found,) = re.findall(r'__version__ = "(.+)"', (ROOT / "lora_export/version.py").read_text())
    return str(found)


def core_project() -> dict[str, Any]:
    """The table `project` of the core, with the description and the links of the whole."""
    core, whole = _project("core/pyproject.toml"), _project("pyproject.toml")
    return core | {key: whole[key] for key in ("readme", "keywords", "classifiers")} | {"version": version()}


def full_project() -> dict[str, Any]:
    """The table `project` of the distribution without code: the core of this version, and what the core lacks."""
    core, whole = _project("core/pyproject.toml"), _project("pyproject.toml")
    own = {Requirement(line).name for line in core["dependencies"]}
    lacking = [line for line in whole["dependencies"] if Requirement(line).name not in own]
    extras = {name: lines for name, lines in whole["optional-dependencies"].items() if name != "dev"}
    full = whole | {"version": version(), "dependencies": [f"{CORE}=={version()}", *lacking]}
    return full | {"optional-dependencies": extras, "scripts": {}}


def urls(owner: str) -> dict[str, str]:
    """The links of the page on PyPI."""
    address = DOCUMENTS["repository"](owner)
    return {
        "Documentation": f"https://{owner}.github.io/lora-export/",
        "Source": address,
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/v{version()}/CHANGELOG.md",
    }


def _project(path: str) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / path).read_text(encoding="utf-8"))["project"]
    return {key: value for key, value in table.items() if key != "dynamic"}


def as_toml(table: Mapping[str, Any], name: str) -> str:
    """A table whose values are texts, lists of texts, and tables of these. A text of JSON is one of TOML."""
    lines = [f"[{name}]"]
    lines += [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in table.items()
        if not isinstance(value, dict)
    ]
    inner = [as_toml(value, f"{name}.{key}") for key, value in table.items() if isinstance(value, dict)]
    return "\n".join([*lines, *inner]) + "\n"


def source_of(name: str, table: Mapping[str, Any], folder: Path, owner: str) -> Path:
    """A folder from which the distribution is built: tracked files alone, and a pyproject.toml of its own."""
    has_code = name == CORE
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    wanted = ("README.md", "LICENSE", "CHANGELOG.md")
    for path in filter(None, listed.split("\0")):
        if path in wanted or (has_code and path.startswith("lora_export/")):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, folder / path)
    tree = f"{DOCUMENTS['repository'](owner)}/blob/v{version()}"
    for page in folder.rglob("*.md"):
        links = "" if page.parent.name == "guide" else tree  # its pages link to each other
        text = DOCUMENTS["published"](page.read_text(encoding="utf-8"), owner, links)
        page.write_text(text, encoding="utf-8", newline="\n")
    wheel = 'packages = ["lora_export"]' if has_code else "bypass-selection = true"
    text = '[build-system]\nrequires = ["hatchling>=1.25"]\nbuild-backend = "hatchling.build"\n\n'
    text += f"{as_toml(table, 'project')}\n[tool.hatch.build.targets.wheel]\n{wheel}\n"
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return folder


def platforms_of_kernel() -> list[str]:
    """The platforms that the kernel has wheels for."""
    names = runpy.run_path(str(ROOT / "kernel/hatch_build.py"))
    return list(names["PLATFORMS"])


def build(source: Path, out: Path, *options: str, **environment: str) -> None:
    """The source archive, and the wheel from it."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(source)],
        check=True,
        stdout=sys.stderr,
        env=os.environ | environment,
    )


# --- Checks ---


def check(files: list[Path]) -> None:
    """End with a message where an archive is not what it has to be."""
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True)
    tracked = subprocess.run(
        ["git", "ls-files", "lora_export"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    for path in files:
        names = _names_in(path)
        has_code = path.name.startswith(CORE.replace("-", "_"))
        inside = {name for name in names if name.startswith("lora_export/")}
        if inside != (set(tracked) if has_code else set()):
            raise SystemExit(f"{path.name} differs from the tracked files: {sorted(inside ^ set(tracked))[:5]}")
        if holds(path, DOCUMENTS["REPOSITORY"].encode()):
            raise SystemExit(f"{path.name} has the placeholder {DOCUMENTS['REPOSITORY']}")
        if not any(name.endswith("LICENSE") for name in names):
            raise SystemExit(f"{path.name} has no licence")
        if path.suffix == ".whl" and path.stat().st_size > LARGEST_WHEEL:
            raise SystemExit(f"{path.name} has {path.stat().st_size:,} bytes, more than {LARGEST_WHEEL:,}")


def _names_in(path: Path) -> set[str]:
    """The files of an archive, without the folder that a source archive puts around them."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def holds(path: Path, words: bytes) -> bool:
    """Whether a file of an archive has these bytes."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return any(words in archive.read(name) for name in archive.namelist())
    with tarfile.open(path) as archive:
        opened = (archive.extractfile(member) for member in archive.getmembers())
        return any(words in file.read() for file in opened if file)


def smoke_test(out: Path) -> None:
    """Install the core with onnxruntime in a fresh environment, merge with it, and judge the merge."""
    (wheel,) = out.absolute().glob("lora_export_core-*.whl")
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        programs = Path(place) / ("Scripts" if sys.platform == "win32" else "bin")
        install = [str(programs / "python"), "-m", "pip", "install", "--quiet", f"{wheel}[cpu]"]
        subprocess.run(install, check=True)
        subprocess.run([str(programs / "python"), "-c", SMOKE, place], check=True)
        for program, words in (
            ("lora-export-core", "merge base.safetensors adapter -o merged.safetensors"),
            ("lora-export", "verify merged.safetensors --base base.safetensors -a adapter"),
        ):
            subprocess.run([str(programs / program), *words.split()], cwd=place, check=True)


def notes() -> str:
    """What the changelog has of this version."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(version())}.*?\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        raise SystemExit(f"CHANGELOG.md has no section on {version()}")
    return found[1].strip() + "\n"


if __name__ == "__main__":
    main()
