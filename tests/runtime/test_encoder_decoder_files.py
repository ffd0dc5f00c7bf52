"""Which folders have the graphs of an encoder-decoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export import cli
from lora_export.errors import InputRefused
from lora_export.runtime.encoder_decoder_files import (
    GRAPH_FILES,
    adapter_of_file,
    file_for_graph,
    is_encoder_decoder_folder,
    refuse_missing_graph,
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


def test_folder_with_some_of_the_graphs_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    refuse_missing_graph(tmp_path)
    for name in GRAPH_FILES[:2]:
        (tmp_path / name).touch()
        with pytest.raises(InputRefused, match=f"and no {GRAPH_FILES[2]}. An encoder-decoder is run with its cache"):
            refuse_missing_graph(tmp_path)
    (tmp_path / GRAPH_FILES[2]).touch()
    refuse_missing_graph(tmp_path)
    (tmp_path / GRAPH_FILES[2]).unlink()
    (tmp_path / "model.safetensors").touch()  # it is the folder of a model
    refuse_missing_graph(tmp_path)


@pytest.mark.parametrize("line", ["generate FOLDER --prompt x", "verify FOLDER --model base"])
def test_commands_name_the_graph_that_is_missing(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in GRAPH_FILES[1:]:
        (tmp_path / name).touch()
    assert cli.run(line.replace("FOLDER", str(tmp_path)).split()) == 3
    assert f"and no {GRAPH_FILES[0]}. " in capsys.readouterr().err
