"""Names of the Hugging Face Hub on the command line: from the local cache, or with the command that downloads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from support.cli import answer, call
from support.hub import COMMIT, cached
from support.small_models import small_adapter, small_model, words_tokenizer


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a model and an adapter for it."""
    folder = tmp_path_factory.mktemp("hub")
    base = words_tokenizer(small_model("bert", folder / "base"))
    adapter = small_adapter("bert", base, folder / "adapter")
    for name, source in (("org/small", base), ("someone/fr", adapter)):
        cached(folder / "hub", name, {file.name: file for file in source.iterdir()})
    return folder / "hub"


@pytest.fixture
def work(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, beside the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_takes_names_that_are_in_the_cache(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("merge", "org/small", "someone/fr", "-o", "merged") == 0
    assert f"org/small: the snapshot {COMMIT} in the Hugging Face cache" in capsys.readouterr().err
    code, verdict = answer(capsys, "verify", "merged", "--base", "org/small", "-a", f"someone/fr@{COMMIT}")
    assert (code, verdict["outcome"]) == (0, "same")
    assert [adapter["name"] for adapter in verdict["about"]["adapters"]] == ["fr"]
    assert answer(capsys, "inspect", "someone/fr")[0] == 0
    words = ("onnx", "org/small", "-a", "en=someone/fr", "--lora", "inputs", "-o", "graph.onnx")
    code, document = answer(capsys, *words)
    assert (code, document["files"]) == (0, ["graph.onnx", "en.onnx_adapter"])
    code, verdict = answer(capsys, "verify", "graph.onnx", "--model", "org/small")
    assert (code, verdict["outcome"]) == (0, "same")


def test_an_adapter_records_the_name_of_its_base(work: Path) -> None:
    lines = [{"text": f"very {word} film", "label": word} for word in ("good", "bad") * 10]
    Path("data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call("train", "org/small", "--data", "data.jsonl", "-o", "adapter", "--epochs", "1") == 0
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/small"


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "org/other", "someone/fr", "-o", "out"),
        ("merge", "org/small", "org/other", "-o", "out"),
        ("onnx", "org/other", "-o", "out.onnx"),
        ("torchscript", "org/small", "-a", "x=org/other", "-o", "out.pt"),
        ("verify", "out", "--model", "org/other"),
        ("verify", "out", "--base", "org/other", "-a", "someone/fr"),
        ("train", "org/other", "--data", "data.jsonl", "-o", "out"),
        ("inspect", "org/other"),
        ("convert", "org/other", "--for", "graph.onnx", "-o", "x.onnx_adapter"),
    ],
)
def test_a_name_that_is_not_in_the_cache_leads_to_the_download(
    work: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 3
    assert "lora-export downloads nothing. To get it: hf download org/other\n" in capsys.readouterr().err
    assert list(work.iterdir()) == []
