"""Names of the Hugging Face Hub on the command line: from the local cache, or by --download."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

import lora_export
from lora_export.api.onnx import checked_request
from lora_export.artifacts.artifact import open_artifact
from lora_export.options.export import OnnxOptions
from support.cli import answer, call
from support.gguf_files import llama
from support.hub import COMMIT, cached
from support.hub_server import ask, hub_server
from support.preflight_adapters import CASES
from support.small_models import small_adapter, small_model, words_tokenizer

COMMANDS = [
    ("merge", "org/other", "someone/fr", "-o", "out"),
    ("merge", "org/small", "org/other", "-o", "out"),
    ("onnx", "org/other", "-o", "out.onnx"),
    ("torchscript", "org/small", "-a", "x=org/other", "-o", "out.pt"),
    ("verify", "out", "--model", "org/other"),
    ("verify", "out", "--base", "org/other", "-a", "someone/fr"),
    ("train", "org/other", "--data", "data.jsonl", "-o", "out"),
    ("inspect", "org/other"),
    ("convert", "org/other", "--for", "graph.onnx", "-o", "x.onnx_adapter"),
    ("combine", "someone/fr", "org/other", "-o", "out"),
    ("resize", "org/other", "-o", "out", "--rank", "1"),
    ("extract", "org/small", "org/other", "-o", "out", "--rank", "1"),
    ("unmerge", "org/other", "someone/fr", "-o", "out", "--base-from", "residual"),
]


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


@pytest.mark.slow
def test_every_command_takes_names_that_are_in_the_cache(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("merge", "org/small", "someone/fr", "-o", "merged") == 0
    assert f"org/small: the snapshot {COMMIT} in the Hugging Face cache" in capsys.readouterr().err
    manifest = json.loads(Path("merged/lora_export.json").read_text())
    assert manifest["base_hub"] == {"repository": "org/small", "revision": COMMIT}
    assert [one["hub"] for one in manifest["adapters"]] == [{"repository": "someone/fr", "revision": COMMIT}]
    code, verdict = answer(capsys, "verify", "merged", "--base", "org/small", "-a", f"someone/fr@{COMMIT}")
    assert (code, verdict["outcome"]) == (0, "same")
    assert verdict["about"]["adapters"][0]["hub"]["revision"] == COMMIT
    assert [adapter["name"] for adapter in verdict["about"]["adapters"]] == ["fr"]
    assert answer(capsys, "inspect", "someone/fr")[0] == 0
    words = ("onnx", "org/small", "-a", "en=someone/fr", "--lora", "inputs", "-o", "graph.onnx")
    code, document = answer(capsys, *words)
    assert (code, document["files"]) == (0, ["graph.onnx", "en.onnx_adapter"])
    assert open_artifact(Path("graph.onnx")).record.content["base_hub"]["revision"] == COMMIT
    code, verdict = answer(capsys, "verify", "graph.onnx", "--model", "org/small")
    assert (code, verdict["outcome"]) == (0, "same")


@pytest.mark.slow
def test_an_adapter_records_the_name_of_its_base(work: Path) -> None:
    lines = [{"text": f"very {word} film", "label": word} for word in ("good", "bad") * 10]
    Path("data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call("train", "org/small", "--data", "data.jsonl", "-o", "adapter", "--epochs", "1") == 0
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/small"


@pytest.mark.parametrize("words", COMMANDS)
def test_a_name_that_is_not_in_the_cache_leads_to_the_download(
    work: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 3
    assert "To download it, add --download, or use: hf download org/other\n" in capsys.readouterr().err
    assert list(work.iterdir()) == []


def addresses(words: tuple[str, ...]) -> list[str]:
    """The words with addresses in place of names of the Hub."""
    return [re.sub(r"(^|=)(?=org/|someone/)", r"\1hf://", word) for word in words]


@pytest.mark.parametrize("is_address", [False, True])
@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_asks_the_hub_with_download_and_by_address(
    work: Path,
    words: tuple[str, ...],
    is_address: bool,
    capsys: pytest.CaptureFixture[str],
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = addresses(words) if is_address else [*words, "--download"]
    with hub_server({}) as server:
        ask(server, hub, monkeypatch)
        assert call(*arguments) == 3
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert call(*arguments) == 6
    told = capsys.readouterr().err
    assert f"{server.endpoint} has no repository org/other, or it is private" in told
    assert "org/other is not in the Hugging Face cache, and HF_HUB_OFFLINE" in told
    assert list(work.iterdir()) == []


def test_an_adapter_is_read_with_the_config_of_a_name(work: Path) -> None:
    """llama.cpp orders the rows of q and k by the heads of the base."""
    llama().save_pretrained("base")
    CASES["plain"].write(Path("plain"))
    lora_export.convert("plain", output="a.gguf", to="gguf", base="base")
    cached(work / "cache", "org/llama", {file.name: file for file in Path("base").iterdir()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(work / "cache"))
        assert lora_export.check("a.gguf", runtimes=["vllm"], base="org/llama").outcomes
        for base in ({"reference": "org/llama"}, {"checkpoint": "org/llama"}):
            options = OnnxOptions("graph.onnx", output="out.onnx", adapters=["a.gguf"], **base)
            (adapter,) = checked_request(options, "graph.onnx").adapters
            assert adapter.format == "gguf"


def test_an_address_of_the_hub_is_no_output(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("merge", "org/small", "someone/fr", "-o", "hf://org/out") == 3
    assert "hf://org/out: hf:// is read where a model or an adapter is named" in capsys.readouterr().err
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("adapter", "more"),
    [
        ("fr=someone/fr", ["--download"]),
        ("fr=hf://someone/fr@main", []),
        ("hf://org/all/fr", []),
        ("hf://someone/fr/", []),
    ],
)
def test_a_merge_of_downloads_is_that_of_the_files(
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: str,
    more: list[str],
) -> None:
    folders = {"org/small": hub.parent / "base", "someone/fr": hub.parent / "adapter"}
    files = {name: {file.name: file.read_bytes() for file in at.iterdir()} for name, at in folders.items()}
    assert call("merge", folders["org/small"], folders["someone/fr"], "-o", tmp_path / "expected") == 0
    merged = {file.name: file.read_bytes() for file in (tmp_path / "expected").iterdir()}
    files |= {"org/all": {f"fr/{name}": content for name, content in files["someone/fr"].items()}, "org/fr": merged}
    base_name = "org/small" if more else f"hf://org/small@{COMMIT}"
    monkeypatch.chdir(tmp_path)
    with hub_server(files) as server:
        ask(server, tmp_path / "cache", monkeypatch)
        code, _ = answer(capsys, "merge", base_name, adapter, "-o", "merged", *more)
        assert call("verify", "hf://org/fr", "--base", base_name, "-a", adapter, *more) == 0
    manifest = json.loads(Path("merged/lora_export.json").read_text())
    (own,) = manifest["adapters"]
    assert (code, own["name"]) == (0, "fr") and manifest["base_hub"]["revision"] == own["hub"]["revision"] == COMMIT

    base = load_file(folders["org/small"] / "model.safetensors")
    tensors, expected = load_file("merged/model.safetensors"), load_file("expected/model.safetensors")
    assert any(tensors[name].tobytes() != base[name].tobytes() for name in base)
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.slow
def test_a_cut_download_leaves_no_output(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {file.name: file.read_bytes() for file in (hub.parent / "base").iterdir()}
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with hub_server({"org/small": files}) as server:
        ask(server, tmp_path / "cache", monkeypatch)
        server.cut.add("model.safetensors")
        assert call("merge", "org/small", hub.parent / "adapter", "-o", "merged", "--download") == 6
    assert list(Path().iterdir()) == []
