"""Which folders have the graphs of an encoder-decoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.runtime.encoder_decoder_files import (
    GRAPH_FILES,
    adapter_of_file,
    file_for_graph,
    is_encoder_decoder_folder,
)


def test_folder_with_all_three_graphs_is_one(tmp_path: Path) -> None:
    for name in GRAPH_FILES:
        assert not is_encoder_decoder_folder(tmp_path)
        (tmp_path / name).touch()
    assert is_encoder_decoder_folder(tmp_path)
    assert not is_encoder_decoder_folder(tmp_path / GRAPH_FILES[0])


def test_each_graph_has_a_file_of_an_adapter() -> None:
    names = [file_for_graph("my.fr", graph) for graph in GRAPH_FILES]
    assert names[0] == "my.fr.encoder_model.onnx_adapter"
    assert len(set(names)) == 3
    assert {adapter_of_file(Path("folder", name)) for name in names} == {"my.fr"}
    assert adapter_of_file(Path("fr.onnx_adapter")) == adapter_of_file(Path("fr.encoder_model.onnx")) == ""


@pytest.mark.parametrize("name", GRAPH_FILES)
def test_folder_that_lacks_one_is_none(tmp_path: Path, name: str) -> None:
    for other in GRAPH_FILES:
        (tmp_path / other).touch()
    (tmp_path / name).unlink()
    assert not is_encoder_decoder_folder(tmp_path)
