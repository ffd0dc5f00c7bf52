"""The README and the guide: every command line and every Python block runs, and nothing is left undocumented."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import click
import pytest

from lora_export.cli import COMMANDS, command_named
from lora_export.cli.guide import TOPICS
from lora_export.errors import LoraExportError
from support import ROOT
from support.page_inputs import PageInputs
from support.pages import GUIDE, PageRun, blocks, forget_modules, page_text
from support.slow import slow_but

# Page -> what is in its folder before its first block runs.
NEEDS = {
    "README": ("base", "texts.jsonl", "adapter"),
    "tasks": ("base", "texts.jsonl", "adapter", "fr", "de", "base.onnx", "decoder", "pirate"),
    "install": (),
    "ollama": ("llama", "my-lora"),
    "sdxl": ("sdxl", "ink.safetensors", "oil.safetensors", "pastel.safetensors"),
    "customers": ("classifier", "customers", "texts.jsonl"),
    "gate": ("base", "adapter", "fr"),
    "browser": ("base", "fr", "de"),
    "training": ("base", "texts.jsonl", "net.py", "numbers.npz", "decoder"),
    "qlora": ("decoder", "texts.jsonl"),
    "models": ("net-adapter",),
    "adapters": ("adapter",),
    "kinds": ("base", "de-loha"),
    "diffusion": ("sdxl", "ink.safetensors"),
    "runtimes": ("base", "adapter"),
    "changing": ("base", "adapter", "fr", "de"),
    "combining": ("base", "fr", "de"),
    "merging": ("base", "adapter", "fr", "de", "base.onnx"),
    "onnx": ("base", "adapter", "fr", "base.onnx"),
    "torchscript": ("base", "adapter"),
    "many-adapters": ("base", "adapter", "fr", "de", "base.onnx"),
    "slots": ("base", "fr", "de"),
    "fleet": ("base", "fr", "de"),
    "cost": (),
    "generation": ("decoder", "pirate"),
    "images": (),
    "genai": ("decoder", "pirate", "genai"),
    "quantised": ("base", "fr", "int4.onnx"),
    "kept-quantised": (),
    "gguf": (),
    "verdict": ("base", "adapter", "model.onnx", "merged"),
    "judged": (),
    "runners": ("base", "adapter", "fr", "model.onnx"),
    "endpoints": (),
    "stores": (),
    "ci": ("base", "adapter", "model.onnx", "merged"),
    "python": ("base", "adapter", "fr", "base.onnx"),
    "configuration": (),
    "limits": (),
}
# The others have several exports or trainings
QUICK = ("README", "install", "judged", "endpoints", "cost", "stores", "python", "configuration", "limits")
FOLDERS = ("samples", "tests", "tests/benchmarks")  # with a README of their own
README = page_text("README")
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
COMMAND_LINES = [
    (page, line)
    for page in NEEDS
    for block in blocks(page)
    if block.language == "sh"
    for line in block.commands
    if line.startswith("lora-export ")
]


def command_of(name: str) -> click.Command:
    return command_named(name)


def options_of(name: str) -> list[click.Option]:
    return [parameter for parameter in command_of(name).params if isinstance(parameter, click.Option)]


def exit_codes(error: type[LoraExportError] = LoraExportError) -> set[int]:
    return {error.exit_code}.union(*map(exit_codes, error.__subclasses__()))


# --- every page runs ---


@pytest.mark.parametrize("page", slow_but(QUICK, NEEDS))
def test_every_block_of_a_page_runs(
    page: str,
    page_inputs: PageInputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in NEEDS[page]:
        page_inputs.copy(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    page_run = PageRun(page, capsys)
    try:
        for block in blocks(page):
            page_run.run(block)
    finally:
        forget_modules(tmp_path)


def test_every_page_of_the_guide_is_run() -> None:
    assert list(NEEDS) == ["README", *TOPICS]
    assert {path.stem for path in GUIDE.iterdir()} == set(TOPICS)


@pytest.mark.parametrize("page", NEEDS)
def test_a_block_that_is_not_run_gives_a_reason(page: str) -> None:
    known = {
        ("sh", ""),
        ("sh", "no-test"),
        ("python", ""),
        ("text", ""),
        ("text", "output"),
        ("json", ""),
        ("toml", ""),
    }
    for block in blocks(page):
        assert (block.language, block.info) in known or block.is_file
        assert block.has_reason is (block.info == "no-test"), f"{page}, line {block.line}"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```sh\nlora-export inspect nothing\n```\n", "ended with 3"),
        ("```sh\nlora-export guide ci  # exits 3\n```\n", "ended with 0"),
        ("```sh\nlora-export guide ci\n```\n```text output\nVerify nowhere\n```\n", "not what is printed"),
        ("```sh\nlora-export guide\n```\n```text output\ncost  Seconds, memory and\n```\n", "not what is printed"),
    ],
)
def test_a_page_that_is_wrong_is_noticed(
    text: str, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("support.pages.page_text", lambda _: text)
    page_run = PageRun("page", capsys)
    with pytest.raises(pytest.fail.Exception, match=complaint):
        for block in blocks("page"):
            page_run.run(block)


# --- every command, option and exit code is documented ---


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_row_in_the_readme(name: str) -> None:
    assert re.search(rf"^\| `lora-export {name}\b[^`]*` \| \S", README, re.M)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_of_a_command(name: str) -> None:
    assert command_of(name).help
    unexplained = [option.opts for option in options_of(name) if not option.help or option.hidden]
    assert unexplained == []


def test_the_table_of_exit_codes_is_complete() -> None:
    documented = [int(code) for code in re.findall(r"^\| (\d+) \| \S", README, re.M)]
    assert documented == sorted({0, 2, 130, 143} | exit_codes())


def test_the_table_of_extras_is_complete() -> None:
    import tomllib

    projects = [tomllib.loads((ROOT / name / "pyproject.toml").read_text(encoding="utf-8")) for name in ("", "core")]
    documented = re.findall(r"^\| `([a-z]+)` \| \S", page_text("install"), re.M)
    assert sorted(documented) == sorted(set().union(*(one["project"]["optional-dependencies"] for one in projects)))


def test_the_readme_begins_with_three_commands() -> None:
    first = "\n".join(README.splitlines()[:10])
    assert re.findall(r"^lora-export ([a-z]+)", first, re.M) == ["train", "merge", "verify"]


def test_the_installation_of_the_readme_works_from_a_clone() -> None:
    import tomllib

    lines = [line.split("#")[0].strip() for block in blocks("README") for line in block.text.splitlines()]
    (line,) = [line for line in lines if line.startswith("pip install")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.fullmatch(r"pip install '\.\[([a-z,]+)\]'", line)
    assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120
    assert max(map(len, README.splitlines())) <= 160


# --- nothing is documented that does not exist ---


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_every_documented_command_line_parses(page: str, line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    assert name in COMMANDS
    command_of(name).make_context(name, arguments)  # raises click's UsageError for what it does not know


def test_the_pages_show_every_command() -> None:
    assert {line.split()[1] for _, line in COMMAND_LINES} == set(COMMANDS)


def spans_of(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page_text(page), flags=re.M | re.S))


@pytest.mark.parametrize("page", NEEDS)
def test_every_option_that_a_page_names_exists(page: str) -> None:
    named = {word for span in spans_of(page) for word in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span)}
    known = {
        spelling
        for name in COMMANDS
        for option in options_of(name)
        for spelling in (*option.opts, *option.secondary_opts)
    }
    assert named <= known | {"--help", "--version"}


@pytest.mark.parametrize("page", NEEDS)
def test_every_page_that_a_page_refers_to_exists(page: str) -> None:
    named = re.findall(r"lora-export guide ([a-z-]+)", page_text(page))
    assert set(named) <= set(TOPICS) - {page}


def test_every_link_within_the_repository_leads_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README) if "://" not in target]
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []
    assert {f"lora_export/guide/{topic}.md" for topic in TOPICS} <= set(targets)


DOCUMENTS = [ROOT / "README.md", *GUIDE.glob("*.md"), *(ROOT / folder / "README.md" for folder in FOLDERS)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_the_repository_that_a_document_names_exists(document: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = re.findall(r"[a-z_0-9]+(?:/[a-z_0-9-]+)+\.(?:py|md|yml|json)", prose)
    roots = (ROOT, ROOT / "tests", ROOT / "lora_export")
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


# --- the two commands of a newcomer ---


def test_the_readme_shows_only_make_targets_that_exist() -> None:
    shown = {match for block in blocks("README") for match in re.findall(r"^make ([a-z-]+)", block.text, re.M)}
    shown |= {span.removeprefix("make ") for span in SPANS if span.startswith("make ")}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"demo", "test"} <= shown <= set(targets)


def test_ci_runs_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line.partition("#")[0].strip() for block in blocks("README") for line in block.commands]
    assert "make test" in commands and script.read_text(encoding="utf-8").splitlines()[-1] == "make test"
