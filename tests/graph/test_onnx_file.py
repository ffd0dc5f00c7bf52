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

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file import writing
from lora_export.graph.onnx_file.protobuf_wire import MAX_MESSAGE_BYTES
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import append_metadata, save_graph
from lora_export.storage.hashes import file_sha256
from support.exported_models import EVERY_MODEL, exported, inputs
from support.graphs import a_graph, run, stored
from support.small_graphs import LINEAR

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
    assert np.array_equal(stored(load_graph(external(tmp_path)), "m.weight"), WEIGHT)


@pytest.mark.fault(38)
def test_a_bare_file_name_is_checked_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (tmp_path / "inner").mkdir()
    external(tmp_path / "inner", location="../secret.bin")
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(InputRefused, match="outside the model's folder"):
        load_graph(Path("model.onnx"))
    external(tmp_path / "inner")
    assert np.array_equal(stored(load_graph(Path("model.onnx")), "m.weight"), WEIGHT)


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"location": "/etc/passwd"}, r"outside the model's folder \('/etc/passwd'\)"),
        ({"location": "../x.data"}, r"outside the model's folder"),
        ({"location": "sub/../../x.data"}, r"outside the model's folder"),
        ({"location": "a\0b"}, r"outside the model's folder"),
        ({"location": "none.data"}, r"none.data: No such file"),
        ({"location": "."}, r"not a regular file with one name"),
        ({"offset": "9"}, r"bytes 9 to 33 of weights.data, which has 32"),
        ({"length": "20"}, r"20 bytes are recorded, but FLOAT \[3, 2\] has 24"),
        ({"length": "99999999999999"}, r"99999999999999 bytes are recorded"),
    ],
)
def test_external_data_that_is_not_what_it_should_be_is_refused(
    tmp_path: Path, fields: dict[str, str], problem: str
) -> None:
    with pytest.raises(InputRefused, match=rf"model.onnx: 1 tensors cannot be read .*\n  m.weight: .*{problem}"):
        load_graph(external(tmp_path, **fields))


@pytest.mark.fault(38)
def test_an_absolute_location_is_refused_even_below_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="outside the model's folder"):
        load_graph(external(tmp_path, location=str(tmp_path / "weights.data")))


def symlinked(data: Path, elsewhere: Path) -> None:
    data.rename(elsewhere)
    data.symlink_to(elsewhere)


def hard_linked(data: Path, elsewhere: Path) -> None:
    elsewhere.hardlink_to(data)


def a_fifo(data: Path, elsewhere: Path) -> None:
    data.rename(elsewhere)
    os.mkfifo(data)


@pytest.mark.fault(38)
@pytest.mark.parametrize("trick", [symlinked, hard_linked, a_fifo])
def test_data_that_lives_elsewhere_is_refused(tmp_path: Path, trick: Callable[[Path, Path], None]) -> None:
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model")
    trick(tmp_path / "model" / "weights.data", tmp_path / "elsewhere")
    with pytest.raises(InputRefused, match=r"by a copy of the file"):
        load_graph(path)


@pytest.mark.fault(38)
def test_a_folder_behind_a_symbolic_link_is_the_users_own_choice(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    external(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert np.array_equal(stored(load_graph(tmp_path / "link" / "model.onnx"), "m.weight"), WEIGHT)


@pytest.mark.fault(37)
def test_data_cut_short_by_one_byte_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path)
    os.truncate(tmp_path / "weights.data", 31)
    with pytest.raises(InputRefused, match=r"bytes 8 to 32 of weights.data, which has 31"):
        load_graph(path)


@pytest.mark.parametrize("content", [b"", b"\x08", b"no protobuf at all", bytes(100)])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputRefused, match="is no ONNX file"):
        load_graph(path)


@pytest.mark.fault(37)
@pytest.mark.parametrize("where", ["property", "operator"])
def test_what_is_no_text_is_refused(tmp_path: Path, where: str) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N] x) => (float[N] y) { y = Identity(x) }'
    )
    proto.metadata_props.add(key="maker", value="somebody")
    content = proto.SerializeToString()
    word = b"somebody" if where == "property" else b"Identity"
    (tmp_path / "m.onnx").write_bytes(content.replace(word, b"\x80" + word[1:]))
    with pytest.raises(InputRefused, match=r"is a damaged ONNX file: b'.x80.* is not UTF-8 text"):
        load_graph(tmp_path / "m.onnx")


def test_a_negative_offset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="-8"):
        load_graph(external(tmp_path, offset="-8"))


def test_a_graph_cut_short_is_refused(tmp_path: Path) -> None:
    (path,) = save_graph(a_graph(LINEAR), tmp_path, "model.onnx")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputRefused, match="is no ONNX file, or a damaged one"):
        load_graph(path)


@pytest.mark.fault(41)
def test_a_missing_file_a_folder_and_a_fifo_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.onnx")
    for name, problem in [("none.onnx", "No such file"), (".", "not a regular file"), ("fifo.onnx", "not a regular")]:
        with pytest.raises(InputRefused, match=problem):
            load_graph(tmp_path / name)


# --- writing ---


def test_a_small_graph_is_one_file_that_can_be_read_again(tmp_path: Path) -> None:
    model = load_graph(external(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    assert save_graph(model, out, "model.onnx", metadata={"made_by": "a test"}) == [out / "model.onnx"]
    assert list(out.iterdir()) == [out / "model.onnx"]
    again = load_graph(out / "model.onnx")
    assert again.metadata_props["made_by"] == "a test"
    assert np.array_equal(run(again, x=np.float32([[1, 0, 0]]))["y"], [[(1 + 10) * 7, (4 + 20) * 8]])


@pytest.mark.fault(36, 39)
def test_weights_that_are_too_many_go_into_a_file_named_by_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 100)
    monkeypatch.setattr(writing, "MIN_EXTERNAL_BYTES", 16)
    model = a_graph(LINEAR)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.float32(WEIGHT).repeat(9, 1)[:, ::9])
    assert len(save_graph(model, tmp_path, "small.onnx")) == 1
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 40)
    data, graph = save_graph(model, tmp_path, "model.onnx")
    assert graph == tmp_path / "model.onnx"
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{16}\.data", data.name)
    assert data.stat().st_size == 24
    assert np.array_equal(stored(load_graph(graph), "m.weight"), WEIGHT)
    assert save_graph(model, tmp_path, "model.onnx")[0] == data
    assert data.stat().st_size == 24  # nothing was appended
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.float32(WEIGHT) + 1)
    assert save_graph(model, tmp_path, "model.onnx")[0] != data


def test_a_verdict_is_appended_behind_the_bytes_that_were_proven(tmp_path: Path) -> None:
    (path,) = save_graph(a_graph(LINEAR), tmp_path, "model.onnx", metadata={"made_by": "a test"})
    proven = path.read_bytes()
    append_metadata(path, {"verdict": "same"})
    assert path.read_bytes().startswith(proven)
    again = load_graph(path)
    assert dict(again.metadata_props) == {"made_by": "a test", "verdict": "same"}
    assert run(again, x=np.float32([[1, 0, 0]]))["y"].tolist() == [[(1 + 10) * 7, (4 + 20) * 8]]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"made_by": "a test", "verdict": "same"}


@EVERY_MODEL
def test_a_saved_export_says_nothing_of_this_machine_and_keeps_its_names(tmp_path: Path, name: str) -> None:
    made = exported(name)
    before = find_sites(made.graph).specs
    feeds = {key: value.numpy() for key, value in inputs(name, 3, 5).items()}
    expected = run(made.graph, **feeds)
    (path,) = save_graph(made.graph, tmp_path, "model.onnx")
    content = path.read_bytes()
    for trace in (
        b"site-packages",
        b"graphs.py",
        b'File "',
        str(Path.cwd()).encode(),
        str(Path.home()).encode() + b"/",
    ):
        assert trace not in content
    again = load_graph(path)
    assert find_sites(again).specs == before
    assert all(np.array_equal(value, expected[key]) for key, value in run(again, **feeds).items())


def test_a_foreign_graphs_own_notes_stay_but_for_stack_traces(tmp_path: Path) -> None:
    model = a_graph(LINEAR)
    node = model.graph[0]
    node.metadata_props["author"] = "somebody"
    node.metadata_props["trace"] = 'File "/home/somebody/model.py", line 3, in forward'
    node.doc_string = 'File "/home/somebody/model.py", line 3'
    model.graph[1].doc_string = "adds the bias"
    (path,) = save_graph(model, tmp_path, "model.onnx")
    again = load_graph(path).graph
    assert dict(again[0].metadata_props) == {"author": "somebody"}
    assert [node.doc_string for node in again] == [None, "adds the bias", None]


def test_a_graph_that_onnx_objects_to_is_refused(tmp_path: Path) -> None:
    model = a_graph(LINEAR)
    model.graph[0].op_type = "MadMul"
    with pytest.raises(RuntimeRefused, match=r"not valid ONNX: .*MadMul"):
        save_graph(model, tmp_path, "model.onnx")


# --- too long for one file ---


@pytest.mark.fault(36)
def test_a_graph_longer_than_protobuf_allows_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(MAX_MESSAGE_BYTES)
    with pytest.raises(
        InputRefused, match=r"has 2,147,483,648 bytes\. An ONNX graph must have less than .*external data"
    ):
        load_graph(path)


@pytest.mark.fault(36)
def test_weights_leave_the_graph_before_it_is_serialised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 40)
    monkeypatch.setattr(writing, "MIN_EXTERNAL_BYTES", 16)
    serialised: list[int] = []
    serialise = ir.serde.serialize_model

    def watched(model: ir.Model) -> onnx.ModelProto:
        proto = serialise(model)
        serialised.append(max(len(tensor.raw_data) for tensor in proto.graph.initializer))
        return proto

    monkeypatch.setattr(ir.serde, "serialize_model", watched)
    model = a_graph(LINEAR)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.float32(WEIGHT))
    model.graph.initializers["m.bias"].const_value = ir.Tensor(np.float32([5, 6, 7, 8, 9])[:2])
    save_graph(model, tmp_path, "model.onnx", metadata={"x": "y" * 40})
    assert serialised and max(serialised) <= 16


@pytest.mark.fault(36)
def test_constants_that_no_graph_can_hold_are_refused_by_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MAX_MESSAGE_BYTES", 100)
    model = a_graph(LINEAR)
    value = ir.AttrTensor("value", ir.Tensor(np.zeros(25, np.float32)))
    model.graph.insert_before(model.graph[0], ir.Node("", "Constant", [], [value]))
    with pytest.raises(
        RuntimeRefused, match="hold 100 bytes of constants, which ONNX stores in the graph; a graph must have less"
    ):
        save_graph(model, tmp_path, "model.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.fault(36)
def test_a_tensor_of_more_than_2_gib_is_saved_and_read_again(tmp_path: Path) -> None:
    rows = (MAX_MESSAGE_BYTES >> 12) + 1  # of 4 KiB
    model = a_graph(LINEAR)
    big = tmp_path / "zeros"
    with big.open("wb") as file:
        file.truncate(rows << 12)
    zeros = np.memmap(big, np.float32, "r+", shape=(rows, 1024))
    zeros[-1] = 3
    model.graph.initializers["m.weight"].const_value = ir.Tensor(zeros)
    model.graph.initializers["m.weight"].shape = ir.Shape(zeros.shape)
    data, graph = save_graph(model, tmp_path, "model.onnx")
    assert data.stat().st_size == rows << 12 and graph.stat().st_size < 1000
    assert np.array_equal(stored(load_graph(graph), "m.weight")[-1], np.full(1024, 3))


# --- data that lies in nodes, links, and keys that nobody knows ---


@pytest.mark.fault(37)
@pytest.mark.parametrize("key", ["evil", "offset2", ""])
def test_unknown_keys_of_external_data_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputRefused, match="damaged one: Ignoring unknown external data key"):
        load_graph(external(tmp_path, **{key: "1"}))


@pytest.mark.fault(37)
def test_data_that_grew_is_read_where_it_was(tmp_path: Path) -> None:
    path = external(tmp_path)
    with (tmp_path / "weights.data").open("ab") as file:
        file.write(b"more")
    assert np.array_equal(stored(load_graph(path), "m.weight"), WEIGHT)


CONSTANT = "m (float[2] x) => (float[2] y) { c = Constant <value = float[2] {1, 2}> () y = Add(x, c) }"
FUNCTION = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
m (float[2] x) => (float[2] y) { y = own.f(x) }
<domain: "own", opset_import: ["" : 20]>
f (x) => (y) { c = Constant <value = float[2] {1, 2}> () y = Add(x, c) }"""


@pytest.mark.fault(38)
@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "link"])
@pytest.mark.parametrize("where", ["a node", "a function's node"])
def test_data_of_a_node_is_checked_like_that_of_a_weight(tmp_path: Path, where: str, location: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "model/link").symlink_to(tmp_path / "secret")
    in_function = where == "a function's node"
    proto = onnx.parser.parse_model(FUNCTION) if in_function else ir.to_proto(a_graph(CONSTANT))
    nodes = proto.functions[0].node if in_function else proto.graph.node
    tensor = nodes[0].attribute[0].t
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.name = "c"
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "8"}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path = tmp_path / "model/model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputRefused, match="1 tensors cannot be read"):
        load_graph(path)


def cached(hub: Path) -> Path:
    """The graph with external data as a Hugging Face cache keeps it; returns the link to the graph."""
    made = hub / "made"
    made.mkdir()
    external(made)
    snapshot, blobs = hub / "snapshots" / "r", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in made.iterdir():
        blob = file_sha256(path)
        path.rename(blobs / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot / "model.onnx"


@pytest.mark.fault(41)
def test_a_graph_in_a_hugging_face_cache_is_read_and_saved_whole(tmp_path: Path) -> None:
    model = load_graph(cached(tmp_path))
    assert np.array_equal(stored(model, "m.weight"), WEIGHT)
    (tmp_path / "out").mkdir()
    (path,) = save_graph(model, tmp_path / "out", "model.onnx")
    assert np.array_equal(stored(load_graph(path), "m.weight"), WEIGHT)


@pytest.mark.fault(38, 41)
@pytest.mark.parametrize("goal", ["secret", "blobs/secret", "other/blobs/" + "0" * 40, "blobs/" + "0" * 40])
def test_a_link_in_a_cache_leads_to_a_blob_of_its_own_model_or_nowhere(tmp_path: Path, goal: str) -> None:
    path = cached(tmp_path)
    (tmp_path / "other/blobs").mkdir(parents=True)
    (tmp_path / "elsewhere").write_bytes(bytes(32))
    link = path.parent / "weights.data"
    link.unlink()
    if goal == "blobs/" + "0" * 40:  # a blob that is a link itself
        (tmp_path / goal).symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / goal).write_bytes(bytes(32))
    link.symlink_to(Path("../..") / goal)
    with pytest.raises(InputRefused, match="reached through a symbolic link"):
        load_graph(path)
