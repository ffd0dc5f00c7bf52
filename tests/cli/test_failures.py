"""A command that fails: one JSON document on stdout, every report, and an annotation of a GitHub job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_export.api.check
import lora_export.api.merge
import lora_export.api.verify
from lora_export import cli, errors
from lora_export.cli import failures
from lora_export.cli.failures import Invocation, Terminated, failure_of
from lora_export.models.load import load_model
from lora_export.storage import atomic_output
from support import FACTORIES, junit_schema
from support.cli import Capture, answer, call
from support.handmade import base_file, peft_adapter

MODEL = f"{FACTORIES}:wide"
FILE = "ad/adapter_model.safetensors"
FORKS = """
import torch
from torch import nn

class Forks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.fc(x)} if self.fc(x).sum() > 0 else {"y": x}

class Broken(Forks):
    def forward(self, x):
        if torch.jit.is_tracing():
            raise ValueError("no such thing")
        return self.fc(x)

def forks():
    torch.manual_seed(0)
    return Forks(), torch.randn(2, 4)

def broken():
    return Broken(), torch.randn(2, 4)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter that fits it, one that does not, and two models that cannot be exported."""
    folder = tmp_path_factory.mktemp("failures")
    module = load_model(MODEL).module
    save_file(module.state_dict(), folder / "base.safetensors")
    (name,) = [name for name, part in module.named_modules() if name == "up"]
    peft_adapter(folder / "adapter", {name: ([[0.1] * 64], [[0.1]] * 96)})
    peft_adapter(folder / "weak", {name: ([[1e-9] * 64], [[1e-9]] * 96)})
    peft_adapter(folder / "other", {"elsewhere": ([[1.0]], [[1.0]])})
    (folder / "forks.py").write_text(FORKS)
    return folder


def refusals(folder: Path) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Commands, and the code that each ends with."""
    base, adapter, out = str(folder / "base.safetensors"), str(folder / "adapter"), str(folder / "out")
    found = {
        "merge: missing adapter": (3, ("merge", base, f"{folder}/nowhere", "-o", f"{out}.safetensors")),
        "merge: another model's": (3, ("merge", base, f"{folder}/other", "-o", f"{out}.safetensors")),
        "merge: output exists": (7, ("merge", base, adapter, "-o", base)),
        "merge: no adapter": (2, ("merge", base, "-o", f"{out}.safetensors")),
        "merge: unknown option": (2, ("merge", base, adapter, "-o", f"{out}.safetensors", "--nonsense")),
        "onnx: missing adapter": (3, ("onnx", MODEL, "-a", f"{folder}/nowhere", "-o", f"{out}.onnx")),
        "onnx: another model's": (3, ("onnx", MODEL, "-a", f"{folder}/other", "-o", f"{out}.onnx")),
        "onnx: undecided": (5, ("onnx", MODEL, "-a", f"{folder}/weak", "-o", f"{out}.onnx", "--lora", "nodes")),
        "onnx: exporter": (8, ("onnx", f"{folder}/forks.py:forks", "-o", f"{out}.onnx")),
        "onnx: dora": (2, ("onnx", MODEL, "-a", adapter, "-o", f"{out}.onnx", "--dora")),
        "torchscript: missing adapter": (3, ("torchscript", MODEL, "-a", f"{folder}/nowhere", "-o", f"{out}.pt")),
        "torchscript: undecided": (5, ("torchscript", MODEL, "-a", f"{folder}/weak", "-o", f"{out}.pt")),
        "torchscript: exporter": (8, ("torchscript", f"{folder}/forks.py:broken", "-o", f"{out}.pt")),
        "torchscript: output": (7, ("torchscript", MODEL, "-o", f"{folder}/adapter/out.pt", "-a", adapter)),
        "verify: missing candidate": (3, ("verify", f"{folder}/nowhere.onnx", "--model", MODEL)),
        "verify: another model's": (3, ("verify", base, "--model", MODEL, "-a", f"{folder}/other")),
        "verify: nothing to compare": (2, ("verify", base)),
        "train: missing data": (3, ("train", MODEL, "--data", f"{folder}/nowhere.npz", "-o", out)),
        "convert: missing graph": (3, ("convert", adapter, "-o", out, "--for", f"{folder}/nowhere.onnx")),
        "inspect: missing": (3, ("inspect", f"{folder}/nowhere")),
        "no such command": (2, ("mrge", base)),
    }
    if not torch.cuda.is_available():
        found["onnx: no GPU"] = (6, ("onnx", MODEL, "-a", adapter, "-o", f"{out}.onnx", "--provider", "cuda"))
    return found


@pytest.mark.parametrize("case", refusals(Path()))
def test_a_failure_is_the_one_json_document_on_stdout(place: Path, case: str, capsys: Capture) -> None:
    code, arguments = refusals(place)[case]
    found, document = answer(capsys, *arguments)
    message = capsys.readouterr().err
    assert (found, document["exit"], document["schema"]) == (code, code, "lora-export/error/1")
    assert document["error"].partition("\n")[0] in message
    assert document["command"] == ["lora-export", *arguments, "--json"]
    assert not list(place.glob("out*"))


def test_a_document_is_alone_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with click.Context(click.Command("verify")), failures.stdout_for_a_document():
        print("a model's own code")
        subprocess.run([sys.executable, "-c", "print('a process of it')"], check=True)
        failures.print_json({"outcome": "same"})
        subprocess.run([sys.executable, "-c", "print('another')"], check=True)
    told = capfd.readouterr()
    assert told.out == '{"outcome": "same"}\n'
    assert told.err.split("\n")[:3] == ["a model's own code", "a process of it", "another"]


def test_misfits_and_figures_are_in_the_document(place: Path, capsys: Capture) -> None:
    _, document = answer(capsys, *refusals(place)["merge: another model's"][1])
    (misfit,) = document["misfits"]
    assert (document["kind"], misfit["adapter"]) == ("input", "other")
    assert misfit["key"].endswith("elsewhere.lora_A.weight") and "no weight" in misfit["problem"]
    _, document = answer(capsys, *refusals(place)["onnx: undecided"][1])
    assert document["kind"] == document["proof"]["outcome"] == "undecided"
    assert document["proof"]["comparisons"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_else_is_printed_is_not_beside_the_document(
    place: Path, fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    check = lora_export.api.check.check

    def noisy(**options: Any) -> Any:
        print("as a model's own code does")
        return failing(MemoryError)() if fails else check(**options)

    monkeypatch.setattr(lora_export.api.check, "check", noisy)
    assert call("check", place / "adapter", "--for", "vllm", "--json") == (6 if fails else 0)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["schema"] == f"lora-export/{'error' if fails else 'check-result'}/1"
    assert printed.err.startswith("as a model's own code does\n")
    print("further")
    assert capsys.readouterr().out == "further\n"


def test_no_document_without_json(place: Path, capsys: Capture) -> None:
    cases = ("merge: missing adapter", "merge: no adapter", "verify: nothing to compare", "inspect: missing")
    for case in (*cases, "train: missing data"):
        code, arguments = refusals(place)[case]
        assert call(*arguments) == code
        assert capsys.readouterr().out == ""
    assert call("merge", place / "base.safetensors", place / "nowhere", "-o", place / "x", "--", "--json") == 3
    assert capsys.readouterr().out == ""


# --- Reports of verify ---


def reports(folder: Path) -> list[str]:
    return [word for suffix in ("xml", "json", "html") for word in ("--report", str(folder / f"verdict.{suffix}"))]


@pytest.fixture(params=["verify: missing candidate", "verify: another model's", "verify: nothing to compare"])
def refused(request: pytest.FixtureRequest, place: Path) -> Iterator[tuple[str, ...]]:
    _, arguments = refusals(place)[request.param]
    return arguments


def test_every_report_contains_the_error(refused: tuple[str, ...], tmp_path: Path, capsys: Capture) -> None:
    code, document = answer(capsys, *refused, *reports(tmp_path))
    root = ElementTree.parse(tmp_path / "verdict.xml").getroot()
    assert junit_schema.faults(root) == []
    assert (root.get("tests"), root.get("errors"), root.get("failures")) == ("1", "1", "0")
    (error,) = root.iter("error")
    assert (error.get("type"), error.text) == (document["kind"], document["error"])
    assert json.loads((tmp_path / "verdict.json").read_text()) == document
    page = (tmp_path / "verdict.html").read_text()
    assert f"exit code {code}" in page and "The command ended before there was a verdict" in page
    assert "lora-export verify" in page and document["error"][:20].replace("&", "&amp;") in page


def test_names_in_an_error_stay_text_in_the_page(place: Path, tmp_path: Path) -> None:
    assert call("verify", tmp_path / "<b>x\n", "--model", MODEL, *reports(tmp_path)) == 3
    page = (tmp_path / "verdict.html").read_text()
    assert "&lt;b&gt;x\\n" in page and "<b>" not in page


@pytest.mark.parametrize("first", [(), ("--adapter", "nothing")])
def test_a_report_of_an_error_replaces_no_other_file(place: Path, tmp_path: Path, first: tuple[str, ...]) -> None:
    """Also where the error is that the report's path is an input's, or comes before that is known."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model.safetensors").write_bytes((place / "base.safetensors").read_bytes())
    config, fifo = tmp_path / "base/config.json", tmp_path / "fifo.json"
    config.write_text('{"model_type": "llama"}')
    os.mkfifo(fifo)
    for path in (config, fifo):
        line = ("verify", tmp_path / "base", "--base", tmp_path / "base", *first, "--report", path)
        assert call(*line) in (2, 3, 4, 5)
    assert config.read_text() == '{"model_type": "llama"}'


def test_a_report_that_cannot_be_written_hides_no_error(place: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    written, unknown = tmp_path / "verdict.xml", tmp_path / "verdict.txt"
    paths = [word for path in (unknown, tmp_path / "file/verdict.xml", written) for word in ("--report", path)]
    assert call("verify", place / "nowhere.onnx", "--model", MODEL, *paths) == 3
    message = capsys.readouterr().err
    assert "verdict.txt: unknown report format" in message
    assert f"the report {tmp_path / 'file/verdict.xml'} was not written" in message
    assert "unknown report format" in written.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "verdict.xml"]


def test_a_report_that_cannot_be_written_is_one_error(place: Path, tmp_path: Path, capsys: Capture) -> None:
    """A disk may be read-only: that is known before the work, and the reason why there is no report of it."""
    (tmp_path / "file").touch()
    assert call("verify", place / "nowhere.onnx", "--model", MODEL, "--report", tmp_path / "file/verdict.xml") == 7
    (message,) = capsys.readouterr().err.splitlines()
    assert message == f"Error: {tmp_path / 'file'} is not a folder, so nothing can be written into it"


# --- GitHub ---


@pytest.mark.parametrize("case", ["merge: another model's", "onnx: undecided", "verify: missing candidate"])
def test_a_failure_annotates_the_job_once(
    place: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    _, document = answer(capsys, *refusals(place)[case][1])
    annotations = [line for line in capsys.readouterr().err.splitlines() if line.startswith("::")]
    first = document["error"].partition("\n")[0].replace("%", "%25")
    assert len(annotations) == 1
    assert annotations[0].startswith(f"::error title=lora-export {case.partition(':')[0]}::{first}")


def test_a_wrong_checkpoint_annotates_the_job(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    merged = place / "copy.safetensors"
    merged.write_bytes((place / "base.safetensors").read_bytes())
    code = call("verify", merged, "--base", place / "base.safetensors", "-a", place / "adapter")
    merged.unlink()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("::")]
    assert code == 4 and line.startswith("::error title=verify copy.safetensors%3A different::different: ")
    assert "%0A  up.weight: different" in line


# --- Ctrl-C, SIGTERM, and bugs of ours ---


def failing(error: type[BaseException]) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated"), (MemoryError, 6, "environment")],
)
def test_an_interrupted_command_is_a_document_too(
    tmp_path: Path, error: type[BaseException], code: int, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(lora_export.api.verify, "verify", failing(error))
    found, document = answer(capsys, "verify", "x.onnx", "--model", MODEL, *reports(tmp_path))
    assert (found, document["exit"], document["kind"]) == (code, code, kind)
    assert f'type="{kind}"' in (tmp_path / "verdict.xml").read_text()


@pytest.mark.parametrize(
    ("error", "raised", "named"),
    [
        (ZeroDivisionError, ZeroDivisionError, "ZeroDivisionError"),
        (EOFError, click.Abort, "EOFError"),
        (SystemExit, RuntimeError, "RuntimeError: the command was ended by SystemExit(None)"),  # whose code is 0
    ],
)
def test_a_bug_is_a_document_and_a_traceback(
    error: type[BaseException], raised: type[Exception], named: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(lora_export.api.merge, "merge", failing(error))
    with pytest.raises(raised):
        cli.run(["merge", "base", "adapter", "-o", "out", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (document["exit"], document["kind"]) == (1, "bug")
    assert document["error"].startswith(f"a bug in lora-export: {named}")


def test_an_interruption_after_the_result_is_no_second_document(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    merged = tmp_path / "merged.safetensors"
    assert call("merge", place / "base.safetensors", place / "adapter", "-o", merged) == 0
    monkeypatch.setattr("lora_export.cli.verdicts.annotate_github", failing(KeyboardInterrupt))
    against = ("--base", place / "base.safetensors", "-a", place / "adapter", *reports(tmp_path))
    code, document = answer(capsys, "verify", merged, *against)
    assert (code, document["outcome"]) == (130, "same")
    assert json.loads((tmp_path / "verdict.json").read_text())["outcome"] == "same"


@pytest.mark.slow
def test_sigterm_of_a_process_ends_with_a_document(place: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n\ndef make():\n    print('begun', flush=True)\n    time.sleep(60)\n"
    )
    command = ["verify", str(place / "base.safetensors"), "--model", f"{tmp_path}/slow.py:make", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "lora_export", *command, "--report", str(tmp_path / "verdict.xml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GITHUB_ACTIONS": ""},
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert "begun\n" in child.stderr  # what a model prints is not in the document
        time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        document = json.loads(child.stdout.read())
    assert (child.returncode, document["exit"], document["kind"]) == (143, 143, "terminated")
    assert 'type="terminated"' in (tmp_path / "verdict.xml").read_text()


def test_every_exit_code_of_an_error_has_a_kind() -> None:
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    assert codes <= set(cli.failures.FAILURE_KINDS)
    assert len(set(cli.failures.FAILURE_KINDS.values())) == len(cli.failures.FAILURE_KINDS)


@pytest.mark.parametrize(
    ("words", "accepted"),
    [
        (("onnx", "nowhere", "-a", "nothing", "-o", "o.onnx"), ", `file.py:factory` or an .onnx file"),
        (("torchscript", "g.onnx", "-a", "nothing", "-o", "o.pt"), " or `file.py:factory`"),
        (("train", "g.onnx", "--data", "nothing.jsonl", "-o", "ad"), " or `file.py:factory`"),
    ],
)
def test_a_wrong_model_is_named_before_anything_is_read(
    words: tuple[str, ...], accepted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 3
    models = f"give a Hugging Face folder that exists, `package.module:factory`{accepted}"
    assert capsys.readouterr().err == f"Error: {words[1]!r} is no model: {models}\nNothing was written.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "next_step"),
    [
        (
            ("train", "ad", "--data", "nothing.jsonl", "-o", "new"),
            "Name the model that it is for",
        ),  # data is read later
        (("torchscript", "ad", "-a", "ad", "-o", "new.pt"), "Name the model that it is for"),
        (("torchscript", "kohya.safetensors", "-o", "new.pt"), "Name the model that it is for"),
        (("onnx", "kohya.safetensors", "-o", "new.onnx"), "Name the model that it is for"),
        (("onnx", "new.onnx_adapter", "-o", "new.onnx"), "Name the model that it is for"),
        (("train", "kohya.safetensors", "--data", "nothing.jsonl", "-o", "new"), "Name the model that it is for"),
        (("generate", "ad", "--prompt", "a"), "Name the folder of the graphs"),
        (("generate", FILE, "--prompt", "a"), "Name the folder of the graphs"),
        (("merge", "new.onnx_adapter", "ad", "-o", "new"), "Name the model that it is for"),
        (("unmerge", "ad", "ad", "-o", "new", "--base-from", "residual.bin"), "Name the model that it is for"),
        (("unmerge", FILE, "ad", "-o", "new", "--base-from", "residual.bin"), "Name the model that it is for"),
        (("check", "ad", "--base", "ad", "--for", "vllm"), "Name the model that it is for"),
        (("extract", "ad", "base", "-o", "new", "--rank", "1"), "Name the model that it is for"),
        (("extract", "base", "ad", "-o", "new", "--rank", "1"), "There is nothing to extract from it"),
        (("convert", "ad", "--base", "ad", "-o", "new", "--to", "kohya"), "Name the model that it is for"),
        (("convert", "ad", "--base", FILE, "-o", "new", "--to", "peft"), "Name the model that it is for"),
        (("verify", "ad", "--base", "base", "-a", "ad"), "Give the file or folder that was made with it"),
        (("verify", "ad", "--model", "base", "-a", "ad"), "Give the file or folder that was made with it"),
        (("verify", FILE, "--base", "base", "-a", "ad"), "Give the file or folder that was made with it"),
        (("verify", FILE, "--model", "base", "-a", "ad"), "Give the file or folder that was made with it"),
        (("verify", FILE, "--model", MODEL, "-a", "ad"), "Give the file or folder that was made with it"),
        (("verify", "new.onnx_adapter", "--base", "base", "-a", "ad"), "Give the file or folder that was made with it"),
    ],
)
def test_an_adapter_in_the_place_of_a_model_is_named(
    words: tuple[str, ...], next_step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    peft_adapter(tmp_path / "ad", {"fc": ([[1.0, 2.0]], [[1.0], [1.0]])})
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base" / "model.safetensors", {"fc.weight": [[1.0, 2.0], [3.0, 4.0]]})
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "new.onnx_adapter").touch()
    assert call("convert", "ad", "-o", "kohya.safetensors", "--to", "kohya") == 0
    assert call("merge", "base", "ad", "-o", "merged", "--keep-residual", "residual.bin") == 0
    assert call(*words) == 3
    nothing = "Nothing was written.\n" if "-o" in words else ""
    position = 3 if words[0] in {"check", "convert"} else 2 if words[:2] == ("extract", "base") else 1
    assert capsys.readouterr().err.endswith(f"Error: {words[position]} is an adapter. {next_step}\n{nothing}")


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "link"),
        ("onnx", "link", "-o", "new.onnx"),
        ("torchscript", "link", "-o", "new.pt"),
        ("train", "link", "--data", "nothing.jsonl", "-o", "new"),
        ("onnx", MODEL, "--inputs", "link", "-o", "new.onnx"),
        ("merge", "base", "ad", "--calibration", "link", "-o", "new"),
    ],
)
@pytest.mark.parametrize(
    ("target", "message"),
    [("gone", "link is a symbolic link to gone, which does not exist"), ("link", "link: Too many levels of")],
)
def test_a_link_to_nowhere_is_named(
    words: tuple[str, ...],
    target: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(target)
    peft_adapter(tmp_path / "ad", {"fc": ([[1.0, 2.0]], [[1.0], [1.0]])})
    base_file(tmp_path / "base", {"fc.weight": [[1.0, 2.0], [3.0, 4.0]]})
    assert call(*words) == 3
    assert capsys.readouterr().err.startswith(f"Error: {message}")


@pytest.mark.parametrize(
    ("name", "modules", "code"),
    [
        ("{}", ["fc", "other", "head"], 4),
        ("base_model.model.{}", ["fc", "other", "head"], 4),  # merged, and not unwrapped
        ("base_model.model.{}.base_layer", ["fc", "other", "head"], 4),  # not even merged
        ("base_model.model.{}.base_layer", ["fc"], 4),  # one of several files
        ("base_model.model.{}", ["other", "head"], 3),  # most weights, as `modules_to_save` stores them
        ("", [], 3),  # the head alone is an adapter's, too
    ],
)
def test_weights_of_the_base_beside_an_adapter_are_a_model(
    name: str, modules: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = {"fc": [[1.0, 2.0], [3.0, 4.0]], "other": [[1.0, 2.0], [3.0, 4.0]], "head": [[1.0, 2.0]]}
    peft_adapter(tmp_path / "ad", {"fc": ([[1.0, 2.0]], [[1.0], [1.0]])}, {"head.weight": [[3.0, 4.0]]})
    base_file(tmp_path / "base.safetensors", {f"{module}.weight": value for module, value in weights.items()})
    named = {f"{name.format(module)}.weight": value for module, value in weights.items() if module in modules}
    base_file(tmp_path / "both.safetensors", {**named, **load_file(tmp_path / FILE)})
    assert call("verify", "both.safetensors", "--base", "base.safetensors", "-a", "ad") == code


@pytest.mark.parametrize(
    ("error", "parameters", "published", "states_it"),
    [
        (errors.InputRefused, {"output": "out"}, [], True),
        (errors.Undecided, {"output": "out", "dry_run": False}, [], True),
        (errors.RuntimeRefused, {"output": "out"}, [], True),
        (errors.InputRefused, {"output": "out"}, ["out.training"], False),
        (errors.InputRefused, {"output": "out", "dry_run": True}, [], False),
        (errors.InputRefused, {"output": None}, [], False),
        (errors.InputRefused, {"candidate": "merged"}, [], False),
        (errors.OutputFailed, {"output": "out"}, [], False),
        (errors.WrongUsage, {"output": "out"}, [], False),
    ],
)
def test_a_refused_command_that_writes_ends_with_nothing_was_written(
    error: type[errors.LoraExportError],
    parameters: dict[str, Any],
    published: list[str],
    states_it: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = click.Context(click.Command("merge"))
    context.params = parameters
    monkeypatch.setattr(atomic_output, "published", published)
    failure = failure_of(error("the reason", "  of it"), Invocation([], context))
    assert failure is not None and failure.message == "the reason\n  of it"
    assert failure.text == "Error: the reason\n  of it" + ("\nNothing was written." if states_it else "")
