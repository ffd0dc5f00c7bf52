"""ONNX files: nothing outside the model's folder is read, nothing about this machine is written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphs import EVERY_MODEL, a_graph, exported, inputs, run, stored
from test_graph_fold import LINEAR

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.graph import files, sites

WEIGHT = [[1, 4], [2, 5], [3, 6]]


def external(folder: Path, **fields: str) -> Path:
    """LINEAR, its weight (24 bytes) behind 8 others in `weights.data`; fields of the reference overwritten."""
    proto = ir.to_proto(a_graph(LINEAR))
    tensor = proto.graph.initializer[0]
    (folder / "weights.data").write_bytes(b"\0" * 8 + np.float32(WEIGHT).tobytes())
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in ({"location": "weights.data", "offset": "8", "length": "24"} | fields).items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


# --- reading ---


def test_external_data_below_the_folder_is_read(tmp_path: Path) -> None:
    assert np.array_equal(stored(files.load(external(tmp_path)), "m.weight"), WEIGHT)


def test_a_bare_file_name_is_checked_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (tmp_path / "inner").mkdir()
    external(tmp_path / "inner", location="../secret.bin")
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(InputRefused, match="outside the model's folder"):
        files.load(Path("model.onnx"))
    external(tmp_path / "inner")
    assert np.array_equal(stored(files.load(Path("model.onnx")), "m.weight"), WEIGHT)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"location": "/etc/passwd"}, r"outside the model's folder \('/etc/passwd'\)"),
        ({"location": "../x.data"}, r"outside the model's folder"),
        ({"location": "sub/../../x.data"}, r"outside the model's folder"),
        ({"location": "a\0b"}, r"outside the model's folder"),
        ({"location": "none.data"}, r"none.data: No such file"),
        ({"location": "."}, r"not a plain file"),
        ({"offset": "9"}, r"bytes 9 to 33 of weights.data, which has 32"),
        ({"length": "20"}, r"20 bytes are recorded, FLOAT \[3, 2\] has 24"),
        ({"length": "99999999999999"}, r"99999999999999 bytes are recorded"),
    ],
)
def test_external_data_that_is_not_what_it_should_be_is_refused(
    tmp_path: Path, fields: dict[str, str], problem: str
) -> None:
    with pytest.raises(InputRefused, match=rf"model.onnx: 1 tensors cannot be read .*\n  m.weight: .*{problem}"):
        files.load(external(tmp_path, **fields))


def test_an_absolute_location_is_refused_even_below_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="outside the model's folder"):
        files.load(external(tmp_path, location=str(tmp_path / "weights.data")))


def symlinked(data: Path, elsewhere: Path) -> None:
    data.rename(elsewhere)
    data.symlink_to(elsewhere)


def hard_linked(data: Path, elsewhere: Path) -> None:
    elsewhere.hardlink_to(data)


def a_fifo(data: Path, elsewhere: Path) -> None:
    data.rename(elsewhere)
    os.mkfifo(data)


@pytest.mark.parametrize("trick", [symlinked, hard_linked, a_fifo])
def test_data_that_lives_elsewhere_is_refused(tmp_path: Path, trick: Callable[[Path, Path], None]) -> None:
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model")
    trick(tmp_path / "model" / "weights.data", tmp_path / "elsewhere")
    with pytest.raises(InputRefused, match=r"put a copy of the file there"):
        files.load(path)


def test_a_folder_behind_a_symbolic_link_is_the_users_own_choice(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    external(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert np.array_equal(stored(files.load(tmp_path / "link" / "model.onnx"), "m.weight"), WEIGHT)


def test_data_cut_short_by_one_byte_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path)
    os.truncate(tmp_path / "weights.data", 31)
    with pytest.raises(InputRefused, match=r"bytes 8 to 32 of weights.data, which has 31"):
        files.load(path)


@pytest.mark.parametrize("content", [b"", b"\x08", b"no protobuf at all", bytes(100)])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputRefused, match="is no ONNX file"):
        files.load(path)


def test_a_negative_offset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="-8"):
        files.load(external(tmp_path, offset="-8"))


def test_a_graph_cut_short_is_refused(tmp_path: Path) -> None:
    (path,) = files.save(a_graph(LINEAR), tmp_path, "model.onnx")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputRefused, match="is no ONNX file, or a damaged one"):
        files.load(path)


def test_a_missing_file_a_folder_and_a_fifo_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.onnx")
    for name, problem in [("none.onnx", "No such file"), (".", "not a regular file"), ("fifo.onnx", "not a regular")]:
        with pytest.raises(InputRefused, match=problem):
            files.load(tmp_path / name)


# --- writing ---


def test_a_small_graph_is_one_file_that_can_be_read_again(tmp_path: Path) -> None:
    model = files.load(external(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    assert files.save(model, out, "model.onnx", metadata={"made_by": "a test"}) == [out / "model.onnx"]
    assert list(out.iterdir()) == [out / "model.onnx"]
    again = files.load(out / "model.onnx")
    assert again.metadata_props["made_by"] == "a test"
    assert np.array_equal(run(again, x=np.float32([[1, 0, 0]]))["y"], [[(1 + 10) * 7, (4 + 20) * 8]])


def test_weights_that_are_too_many_go_into_a_file_named_by_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "INLINE", 100)
    monkeypatch.setattr(files, "EXTERNAL_FROM", 16)
    model = a_graph(LINEAR)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.float32(WEIGHT).repeat(9, 1)[:, ::9])
    assert len(files.save(model, tmp_path, "small.onnx")) == 1
    monkeypatch.setattr(files, "INLINE", 40)
    data, graph = files.save(model, tmp_path, "model.onnx")
    assert graph == tmp_path / "model.onnx"
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{16}\.data", data.name)
    assert data.stat().st_size == 24
    assert np.array_equal(stored(files.load(graph), "m.weight"), WEIGHT)
    assert files.save(model, tmp_path, "model.onnx")[0] == data
    assert data.stat().st_size == 24  # nothing was appended
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.float32(WEIGHT) + 1)
    assert files.save(model, tmp_path, "model.onnx")[0] != data


def test_a_verdict_is_appended_behind_the_bytes_that_were_proven(tmp_path: Path) -> None:
    (path,) = files.save(a_graph(LINEAR), tmp_path, "model.onnx", metadata={"made_by": "a test"})
    proven = path.read_bytes()
    files.append_metadata(path, {"verdict": "same"})
    assert path.read_bytes().startswith(proven)
    again = files.load(path)
    assert dict(again.metadata_props) == {"made_by": "a test", "verdict": "same"}
    assert run(again, x=np.float32([[1, 0, 0]]))["y"].tolist() == [[(1 + 10) * 7, (4 + 20) * 8]]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"made_by": "a test", "verdict": "same"}


@EVERY_MODEL
def test_a_saved_export_says_nothing_of_this_machine_and_keeps_its_names(tmp_path: Path, name: str) -> None:
    made = exported(name)
    before = sites.find(made.graph).specs
    feeds = {key: value.numpy() for key, value in inputs(name, 3, 5).items()}
    expected = run(made.graph, **feeds)
    (path,) = files.save(made.graph, tmp_path, "model.onnx")
    content = path.read_bytes()
    for trace in (
        b"site-packages",
        b"graphs.py",
        b'File "',
        str(Path.cwd()).encode(),
        str(Path.home()).encode() + b"/",
    ):
        assert trace not in content
    again = files.load(path)
    assert sites.find(again).specs == before
    assert all(np.array_equal(value, expected[key]) for key, value in run(again, **feeds).items())


def test_a_foreign_graphs_own_notes_stay_but_for_stack_traces(tmp_path: Path) -> None:
    model = a_graph(LINEAR)
    node = model.graph[0]
    node.metadata_props["author"] = "somebody"
    node.metadata_props["trace"] = 'File "/home/somebody/model.py", line 3, in forward'
    node.doc_string = 'File "/home/somebody/model.py", line 3'
    model.graph[1].doc_string = "adds the bias"
    (path,) = files.save(model, tmp_path, "model.onnx")
    again = files.load(path).graph
    assert dict(again[0].metadata_props) == {"author": "somebody"}
    assert [node.doc_string for node in again] == [None, "adds the bias", None]


def test_a_graph_that_onnx_objects_to_is_refused(tmp_path: Path) -> None:
    model = a_graph(LINEAR)
    model.graph[0].op_type = "MadMul"
    with pytest.raises(RuntimeRefused, match=r"not valid ONNX: .*MadMul"):
        files.save(model, tmp_path, "model.onnx")
