"""A proof or an export that needs more memory than there is ends before anything is loaded."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from lora_export.api.memory_needs import (
    STREAMED,
    jobs_that_fit,
    memory_to_merge,
    require_memory_to_export,
    require_memory_to_verify,
)
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import EnvironmentLacking
from lora_export.models import load
from lora_export.runtime.memory import AVAILABLE
from lora_export.storage import safetensors_file
from support.cli import call

PARAMETERS = 1_100_000_000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model of 1.1 billion parameters; its weights are a hole in the file."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header, _ = safetensors_file.layout([("w", np.dtype(np.float16), (1100, 1_000_000))], {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * PARAMETERS)
    return folder


def missing(monkeypatch: pytest.MonkeyPatch, left: float, check: object, *arguments: object) -> str:
    monkeypatch.setenv(AVAILABLE, str(int(left * 2**30)))
    try:
        check(*arguments)  # type: ignore[operator]
    except EnvironmentLacking as refused:
        return str(refused)
    return ""


def test_the_need_grows_with_the_model_and_depends_on_the_candidate(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that can stay in their files are not counted."""
    graph = tmp_path / "m.onnx"
    for candidate, need in ((large, 3.4), (tmp_path, 17.1), (tmp_path / "m.safetensors", 17.1), (graph, 6.8)):
        refused = missing(monkeypatch, need - 0.1, require_memory_to_verify, large, open_artifact(candidate))
        assert f"1.10 billion parameters needs about {need} GiB" in refused
        assert ('`verify("MERGED", base="BASE")`' in refused) == (candidate.suffix != ".onnx")
        assert not missing(monkeypatch, need + 0.1, require_memory_to_verify, large, open_artifact(candidate))
    assert "17.1 GiB" in missing(monkeypatch, 1, require_memory_to_verify, large, open_artifact(large), "float16")
    assert "`lora-export merge`" in missing(monkeypatch, 8.3, require_memory_to_export, large)
    assert not missing(monkeypatch, 8.5, require_memory_to_export, large)
    assert "21.2 GiB" in missing(monkeypatch, 1, require_memory_to_export, large, "float16")
    (large / "config.json").write_text('{"model_type": "mixtral"}')
    assert "17.1 GiB" in missing(monkeypatch, 1, require_memory_to_verify, large, open_artifact(large))
    assert "15.0 GiB" in missing(monkeypatch, 1, require_memory_to_verify, large, open_artifact(graph))
    assert "21.2 GiB" in missing(monkeypatch, 1, require_memory_to_export, large)


def test_a_model_of_unknown_size_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for model in ("some.module:factory", tmp_path / "empty", tmp_path / "m.pt2"):
        assert not missing(monkeypatch, 0.001, require_memory_to_verify, model, open_artifact(tmp_path / "m.onnx"))


def test_commands_end_with_6_before_the_model_is_loaded(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    for module in ("api.train", "runtime.open_artifact"):  # imported now, they would keep `never` under its name
        importlib.import_module(f"lora_export.{module}")
    monkeypatch.setattr(load, "load_model", never)
    monkeypatch.setenv(AVAILABLE, str(3 << 30))
    assert call("verify", large, "--model", large, "--report", tmp_path / "verdict.json") == 6
    assert "needs about 3.4 GiB of memory, and 3.0 GiB are available" in capsys.readouterr().err
    assert "3.4 GiB" in (tmp_path / "verdict.json").read_text()
    assert call("onnx", large, "-o", tmp_path / "model.onnx") == 6
    assert "needs about 8.4 GiB" in capsys.readouterr().err
    assert not list(tmp_path.glob("model*"))


def test_the_adapters_of_a_merge_are_in_memory(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for path, size in ((tmp_path / "adapter" / "a", 3 << 20), (tmp_path / "b", 1 << 20)):
        path.write_bytes(bytes(size))
    assert memory_to_merge([]) == STREAMED
    assert memory_to_merge([tmp_path / "adapter", tmp_path / "b"]) == STREAMED + (4 << 20)


def test_processes_are_as_many_as_have_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for available, expected in ((2 << 30, 2), (1, 1), (99 << 30, 8)):
        monkeypatch.setenv(AVAILABLE, str(available))
        assert jobs_that_fit(8, 1 << 30, told.append) == expected
    assert told[0] == "note: jobs at the same time: 2, not 8. A job needs 1.0 GiB of memory, and 2.0 GiB are available"
    assert len(told) == 2 and jobs_that_fit(1, 1 << 50, told.append) == 1
