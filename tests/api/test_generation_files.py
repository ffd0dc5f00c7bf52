"""What onnxruntime-genai reads beside a graph is copied beside the graph that is made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import models

import lora_export as le
from lora_export.api.generation_files import BESIDE_GRAPH, shorten_genai_config
from lora_export.api.generation_settings import GenerationSettings
from support.api import Recorder
from support.folder_contents import folder_contents
from support.handmade import graph_file, peft_adapter

W = np.arange(6, dtype=np.float32).reshape(3, 2)  # (in, out)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder such as that of the model builder, and beside it an adapter and an empty folder."""
    folder = tmp_path / "built"
    folder.mkdir()
    graph_file(folder / "model.onnx", {"up.weight": W})
    (folder / "genai_config.json").write_text('{"model": {"decoder": {"filename": "model.onnx"}, "type": "llama"}}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    (folder / "notes.txt").write_text("not needed")
    peft_adapter(tmp_path / "fr", {"up": ([[1, 2, 3]], [[1], [10]])})
    (tmp_path / "served").mkdir()
    return folder


def config_in(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "genai_config.json").read_text())["model"])


@pytest.mark.parametrize("command", ["merge", "merged", "nodes", "inputs"])
def test_config_and_tokenizer_are_copied_and_name_the_graph(built: Path, tmp_path: Path, command: str) -> None:
    source, adapter, output = built / "model.onnx", tmp_path / "fr", tmp_path / "served" / "new.onnx"
    if command == "merge":
        le.merge(source, adapter, output)
    else:
        result = le.export_onnx(source, output, adapters=adapter, lora=command, verify=False)
        assert {output.parent / name for name in ("genai_config.json", "tokenizer.json")} <= set(result.files)
    assert config_in(tmp_path / "served") == {"decoder": {"filename": "new.onnx"}, "type": "llama"}
    assert (tmp_path / "served" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (tmp_path / "served" / "notes.txt").exists()
    assert GenerationSettings(tmp_path / "served").rules.repetition_penalty == 1.3


def test_the_files_of_every_tokenizer_of_generating_models_are_known() -> None:
    of_encoders = {"bpe.codes", "entity_vocab.json", "word_pronunciation.json", "word_shape.json"}
    found = set[str]()
    for path in Path(models.__path__[0]).rglob("tokenization_*.py"):
        table = re.search(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", path.read_text(encoding="utf-8"), re.DOTALL)
        found.update(re.findall(r':\s*"([^"]+)"', table[1]) if table else ())
    assert len(found) > 20 and found - of_encoders <= set(BESIDE_GRAPH)


def test_files_that_are_there_stay_and_a_note_names_them(built: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    (tmp_path / "served" / "tokenizer.json").write_text("mine")
    le.export_onnx(
        built / "model.onnx",
        tmp_path / "served" / "model.onnx",
        adapters=tmp_path / "fr",
        lora="nodes",
        verify=False,
        **recorder.callbacks,
    )
    assert (tmp_path / "served" / "tokenizer.json").read_text() == "mine"
    assert config_in(tmp_path / "served")["decoder"] == {"filename": "model.onnx"}
    assert any("exist already and stay as they are: tokenizer.json" in line for line in recorder.messages)


def test_beside_its_source_nothing_is_copied(built: Path, tmp_path: Path) -> None:
    before = folder_contents(built)
    le.merge(built / "model.onnx", tmp_path / "fr", built / "merged.onnx")
    assert {name: text for name, text in folder_contents(built).items() if "merged.onnx" not in name} == before


def test_config_of_another_graph_is_not_copied(built: Path, tmp_path: Path) -> None:
    (built / "genai_config.json").write_text('{"model": {"decoder": {"filename": "other.onnx"}}}')
    le.merge(built / "model.onnx", tmp_path / "fr", tmp_path / "served" / "m.onnx")
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == [
        *("generation_config.json", "m.onnx", "tokenizer.json")
    ]


def test_a_genai_config_allows_no_longer_texts_than_the_graph(built: Path) -> None:
    path = built / "genai_config.json"
    path.write_text('{"model": {"context_length": 256}, "search": {"max_length": null}}')
    shorten_genai_config(built, None)
    assert config_in(built) == {"context_length": 256}
    shorten_genai_config(built, 23)
    assert json.loads(path.read_text()) == {"model": {"context_length": 23}, "search": {"max_length": 23}}
