"""The files of an artifact and their hashes, and the folders of an encoder-decoder."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest

from lora_export import cli
from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.files import (
    EMBEDDING_FILE,
    GRAPH_FILES,
    MERGED_FILE,
    VISION_FILE,
    adapter_of_file,
    file_for_graph,
    graphs_in,
)
from lora_export.errors import InputRefused
from lora_export.storage import input_files

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> { y = MatMul (x, w) }
"""
PEAK = Path("/proc/self/clear_refs")  # sets the peak of this process to what it takes now


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_folder_with_all_three_graphs_is_one(tmp_path: Path) -> None:
    for name in GRAPH_FILES:
        assert not graphs_in(tmp_path)
        (tmp_path / name).touch()
    assert graphs_in(tmp_path)
    assert not graphs_in(tmp_path / GRAPH_FILES[0])


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
    assert not graphs_in(tmp_path)


def test_folder_with_some_of_the_graphs_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    open_artifact(tmp_path).refuse_missing_graph()
    for name in GRAPH_FILES[:2]:
        (tmp_path / name).touch()
        with pytest.raises(InputRefused, match=f"and no {GRAPH_FILES[2]}. An encoder-decoder is run with its cache"):
            open_artifact(tmp_path).refuse_missing_graph()
    (tmp_path / GRAPH_FILES[2]).touch()
    open_artifact(tmp_path).refuse_missing_graph()
    (tmp_path / GRAPH_FILES[2]).unlink()
    (tmp_path / "model.safetensors").touch()  # it is the folder of a model
    open_artifact(tmp_path).refuse_missing_graph()


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        ([VISION_FILE], True),
        ([VISION_FILE, EMBEDDING_FILE], True),
        ([VISION_FILE, EMBEDDING_FILE, MERGED_FILE], False),
        ([MERGED_FILE], False),  # optimum's decoder of texts
        ([VISION_FILE, "prompt_encoder_mask_decoder.onnx"], False),  # optimum's SAM
        ([VISION_FILE, "vision_encoder_quantized.onnx", "prompt_encoder_mask_decoder_quantized.onnx"], False),
        ([VISION_FILE, "vision_encoder_quantized.onnx"], True),  # one graph twice
        ([VISION_FILE, "embed_tokens_fp16.onnx", "decoder_model_merged_q4.onnx"], True),
    ],
)
def test_folder_with_some_of_the_graphs_with_images_is_refused(names: list[str], refused: bool, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InputRefused, match="A model that reads images") if refused else nullcontext():
        open_artifact(tmp_path).refuse_missing_graph()


@pytest.mark.parametrize("line", ["generate FOLDER --prompt x", "verify FOLDER --model base"])
def test_commands_name_the_graph_that_is_missing(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in GRAPH_FILES[1:]:
        (tmp_path / name).touch()
    assert cli.run(line.replace("FOLDER", str(tmp_path)).split()) == 3
    assert f"and no {GRAPH_FILES[0]}. " in capsys.readouterr().err


@pytest.mark.parametrize("block", [input_files.COPIED_AT_ONCE, 3])
def test_hashes_include_external_data_and_all_files_of_a_folder(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "COPIED_AT_ONCE", block)  # the name that is looked for is split into several
    model = onnx.parser.parse_model(TEXT)
    (weight,) = model.graph.initializer
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), "w"))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    both = {name: sha256(tmp_path / name) for name in ("m.onnx", "m.data")}
    assert open_artifact(tmp_path / "m.onnx").hashes == both == open_artifact(tmp_path).hashes
    assert list(open_artifact(tmp_path / "m.data").hashes) == ["m.data"]


@pytest.mark.skipif(not PEAK.exists(), reason="only Linux starts the measured peak anew")
def test_a_graph_is_hashed_block_by_block(tmp_path: Path) -> None:
    """Pages of a file that is mapped count as the process's memory."""
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1 << 24, np.float32), "large"))
    onnx.save(model, tmp_path / "m.onnx")  # 64 MiB
    del model

    def peak() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) << 10

    PEAK.write_text("5")
    before = peak()
    assert open_artifact(tmp_path / "m.onnx").hashes
    assert peak() - before < 16 << 20
