"""Reading ONNX files: what is refused, and what stays in its file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused, OutputFailed
from lora_export.graph.onnx_file import reading
from lora_export.graph.onnx_file.protobuf_wire import MAX_MESSAGE_BYTES
from lora_export.graph.onnx_file.reading import check_file, check_message, innermost_error, load_graph, open_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.storage.hashes import file_sha256
from support.graphs import a_graph, run, stored
from support.handmade import graph_file
from support.small_graphs import LINEAR, LINEAR_WEIGHT, graph_with_external_data


@pytest.mark.parametrize("content", [b"", b"\x08", b"no protobuf at all", bytes(100)])
def test_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputRefused, match="is no ONNX file"):
        load_graph(path)


@pytest.mark.fault(37)
@pytest.mark.parametrize("where", ["property", "operator"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, where: str) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N] x) => (float[N] y) { y = Identity(x) }'
    )
    proto.metadata_props.add(key="maker", value="somebody")
    content = proto.SerializeToString()
    word = b"somebody" if where == "property" else b"Identity"
    (tmp_path / "m.onnx").write_bytes(content.replace(word, b"\x80" + word[1:]))
    with pytest.raises(InputRefused, match=r"is a damaged ONNX file: b'.x80.* is not UTF-8 text"):
        load_graph(tmp_path / "m.onnx")


def test_truncated_graph_is_refused(tmp_path: Path) -> None:
    (path,) = save_graph(a_graph(LINEAR), tmp_path, "model.onnx")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputRefused, match="is no ONNX file, or a damaged one"):
        load_graph(path)


@pytest.mark.fault(41)
def test_missing_file_folder_and_fifo_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.onnx")
    for name, problem in [("none.onnx", "No such file"), (".", "not a regular file"), ("fifo.onnx", "not a regular")]:
        with pytest.raises(InputRefused, match=problem):
            load_graph(tmp_path / name)


@pytest.mark.fault(36)
def test_graph_longer_than_protobuf_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(MAX_MESSAGE_BYTES)
    with pytest.raises(
        InputRefused, match=r"has 2,147,483,648 bytes\. An ONNX graph must have less than .*external data"
    ):
        load_graph(path)


# --- ONNX's checker with onnxruntime's operators, and without external data. ---


NORM = """
g (float[N,2] x) => (float[N,2] y)
<float[2] w = {1,2}>
{ y = SimplifiedLayerNormalization(x, w) }
"""


def message_of(body: str) -> bytes:
    return ir.to_proto(a_graph(body)).SerializeToString()


def test_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"m\xff.onnx")
    with pytest.raises(OutputFailed, match=r"m\\udcff\.onnx is not UTF-8"):
        save_graph(a_graph(LINEAR), tmp_path, path.name)


@pytest.mark.parametrize("body", [LINEAR, NORM])
def test_graphs_of_onnx_and_of_onnxruntime_are_accepted(body: str, tmp_path: Path) -> None:
    check_message(message_of(body))
    (tmp_path / "m.onnx").write_bytes(message_of(body))
    check_file(tmp_path / "m.onnx")


def test_unknown_operator_is_refused(tmp_path: Path) -> None:
    message = message_of(LINEAR.replace("Mul(k", "MadMul(k"))
    with pytest.raises(onnx.checker.ValidationError, match="MadMul"):
        check_message(message)
    (tmp_path / "m.onnx").write_bytes(message)
    with pytest.raises(onnx.checker.ValidationError, match="MadMul"):
        check_file(tmp_path / "m.onnx")


def test_sparse_weights_are_refused_as_such(tmp_path: Path) -> None:
    proto = ir.to_proto(a_graph(LINEAR))
    weight = proto.graph.initializer.pop(0)
    indices = onnx.numpy_helper.from_array(np.arange(6), "at")
    values = onnx.numpy_helper.from_array(np.float32(LINEAR_WEIGHT).ravel(), weight.name)
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3, 2]))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputRefused, match=r"stores m\.weight as sparse tensors: store them dense"):
        load_graph(tmp_path / "model.onnx")


def test_message_is_checked_without_its_external_data(tmp_path: Path) -> None:
    path = graph_with_external_data(tmp_path, location="missing.data")
    check_message(path.read_bytes())
    with pytest.raises(onnx.checker.ValidationError, match="missing"):
        check_file(path)


def test_innermost_error_is_the_first_cause() -> None:
    try:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise ValueError("effect") from cause
    except ValueError as error:
        assert repr(innermost_error(error)) == "KeyError('cause')"


# --- Locations of external data: which are read, and which are refused. ---


def test_external_data_below_folder_is_read(tmp_path: Path) -> None:
    assert np.array_equal(stored(load_graph(graph_with_external_data(tmp_path)), "m.weight"), LINEAR_WEIGHT)


@pytest.mark.parametrize(("data", "files"), [("all.data", 1), ({"a.w": "1.data", "b.w": "2.data", "c.w": "2.data"}, 2)])
def test_each_file_of_data_is_looked_at_once(
    data: str | dict[str, str], files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, look = list[tuple[Path, str]](), reading._size_or_problem
    monkeypatch.setattr(reading, "_size_or_problem", lambda *place: looked.append(place) or look(*place))
    weights = {f"{name}.w": np.full((3, 2), number, np.float32) for number, name in enumerate("abc")}
    model = load_graph(graph_file(tmp_path / "m.onnx", weights, data=data))
    assert len(looked) == files and all(np.array_equal(stored(model, name), weights[name]) for name in weights)


@pytest.mark.fault(38)
def test_bare_file_name_is_checked_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (tmp_path / "inner").mkdir()
    graph_with_external_data(tmp_path / "inner", location="../secret.bin")
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(InputRefused, match="outside the model's folder"):
        load_graph(Path("model.onnx"))
    graph_with_external_data(tmp_path / "inner")
    assert np.array_equal(stored(load_graph(Path("model.onnx")), "m.weight"), LINEAR_WEIGHT)


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
def test_wrong_locations_and_sizes_are_refused(tmp_path: Path, fields: dict[str, str], problem: str) -> None:
    with pytest.raises(InputRefused, match=rf"model.onnx: 1 tensor cannot be read .*\n  m.weight: .*{problem}"):
        load_graph(graph_with_external_data(tmp_path, **fields))


@pytest.mark.fault(38)
def test_absolute_location_is_refused_even_below_folder(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="outside the model's folder"):
        load_graph(graph_with_external_data(tmp_path, location=str(tmp_path / "weights.data")))


def symlinked(data: Path, outside: Path) -> None:
    data.rename(outside)
    data.symlink_to(outside)


def hard_linked(data: Path, outside: Path) -> None:
    outside.hardlink_to(data)


def a_fifo(data: Path, outside: Path) -> None:
    data.rename(outside)
    os.mkfifo(data)


@pytest.mark.fault(38)
@pytest.mark.parametrize("trick", [symlinked, hard_linked, a_fifo])
def test_links_and_fifos_are_refused(tmp_path: Path, trick: Callable[[Path, Path], None]) -> None:
    (tmp_path / "model").mkdir()
    path = graph_with_external_data(tmp_path / "model")
    trick(tmp_path / "model" / "weights.data", tmp_path / "outside")
    with pytest.raises(InputRefused, match=r"by a copy of the file"):
        load_graph(path)


@pytest.mark.fault(38)
def test_folder_behind_symbolic_link_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    graph_with_external_data(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert np.array_equal(stored(load_graph(tmp_path / "link" / "model.onnx"), "m.weight"), LINEAR_WEIGHT)


@pytest.mark.fault(37)
def test_data_truncated_by_one_byte_is_refused(tmp_path: Path) -> None:
    path = graph_with_external_data(tmp_path)
    os.truncate(tmp_path / "weights.data", 31)
    with pytest.raises(InputRefused, match=r"bytes 8 to 32 of weights.data, which has 31"):
        load_graph(path)


def test_negative_offset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="-8"):
        load_graph(graph_with_external_data(tmp_path, offset="-8"))


@pytest.mark.fault(37)
@pytest.mark.parametrize("key", ["evil", "offset2", ""])
def test_unknown_keys_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputRefused, match="damaged one: Ignoring unknown external data key"):
        load_graph(graph_with_external_data(tmp_path, **{key: "1"}))


@pytest.mark.fault(37)
def test_data_with_appended_bytes_is_read(tmp_path: Path) -> None:
    path = graph_with_external_data(tmp_path)
    with (tmp_path / "weights.data").open("ab") as file:
        file.write(b"more")
    assert np.array_equal(stored(load_graph(path), "m.weight"), LINEAR_WEIGHT)


CONSTANT = "m (float[2] x) => (float[2] y) { c = Constant <value = float[2] {1, 2}> () y = Add(x, c) }"


FUNCTION = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
m (float[2] x) => (float[2] y) { y = own.f(x) }
<domain: "own", opset_import: ["" : 20]>
f (x) => (y) { c = Constant <value = float[2] {1, 2}> () y = Add(x, c) }"""


BRANCH = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
m (float[300] x, bool c) => (float[300] y) { y = own.f(x, c) }
<domain: "own", opset_import: ["" : 20]>
f (x, c) => (y) { y = If (c) <
    then_branch = t () => (float[300] a) <float[300] w = {2}> { a = Add(x, w) },
    else_branch = e () => (float[300] b) { b = Identity(x) }> }"""
IN_NODES = pytest.mark.parametrize("where", ["a node", "a function's node"])


def graph_with_data_of_node(folder: Path, where: str, location: str) -> Path:
    """CONSTANT or FUNCTION, whose constant is at a location."""
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
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@IN_NODES
def test_data_of_nodes_is_written_into_the_message(tmp_path: Path, where: str) -> None:
    """No other file has it: neither a copy of the graph nor a merge of it would copy theirs."""
    (tmp_path / "weights.data").write_bytes(np.float32([1, 2]).tobytes())
    model = load_graph(graph_with_data_of_node(tmp_path, where, "weights.data"))
    (tmp_path / "copy").mkdir()
    assert save_graph(model, tmp_path / "copy", "m.onnx") == [tmp_path / "copy/m.onnx"]
    assert run(load_graph(tmp_path / "copy/m.onnx"), x=np.float32([3, 3]))["y"].tolist() == [4, 5]
    assert len(open_graph(tmp_path / "model.onnx").sources) == 2


def test_weights_of_a_functions_branches_are_saved(tmp_path: Path) -> None:
    path, proto = tmp_path / "model.onnx", onnx.parser.parse_model(BRANCH)
    branch = next(one.g for one in proto.functions[0].node[0].attribute if one.name == "then_branch")
    branch.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full(300, 2, np.float32), "w"))
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "copy").mkdir()
    save_graph(load_graph(path), tmp_path / "copy", "m.onnx")
    y = run(load_graph(tmp_path / "copy/m.onnx"), x=np.ones(300, np.float32), c=np.array(True))["y"]
    assert np.array_equal(y, np.full(300, 3))


@pytest.mark.fault(38)
@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "link"])
@IN_NODES
def test_data_of_nodes_is_checked_too(tmp_path: Path, where: str, location: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "model/link").symlink_to(tmp_path / "secret")
    path = graph_with_data_of_node(tmp_path / "model", where, location)
    with pytest.raises(InputRefused, match="1 tensor cannot be read"):
        load_graph(path)


def cached(hub: Path) -> Path:
    """The graph with external data in a Hugging Face cache. Returns the link to the graph."""
    made = hub / "made"
    made.mkdir()
    graph_with_external_data(made)
    snapshot, blobs = hub / "snapshots" / "r", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in made.iterdir():
        blob = file_sha256(path)
        path.rename(blobs / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot / "model.onnx"


def test_a_wrong_length_in_a_hugging_face_cache_is_refused(tmp_path: Path) -> None:
    link = cached(tmp_path)
    graph = onnx.load(link, load_external_data=False)
    for entry in (entry for tensor in graph.graph.initializer for entry in tensor.external_data):
        if entry.key == "length":
            entry.value = str(int(entry.value) // 2)
    link.resolve().write_bytes(graph.SerializeToString())
    with pytest.raises(InputRefused, match="bytes are recorded"):
        load_graph(link)


@pytest.mark.fault(41)
def test_graph_in_hugging_face_cache_is_read_and_saved(tmp_path: Path) -> None:
    model = load_graph(cached(tmp_path))
    assert np.array_equal(stored(model, "m.weight"), LINEAR_WEIGHT)
    (tmp_path / "out").mkdir()
    (path,) = save_graph(model, tmp_path / "out", "model.onnx")
    assert np.array_equal(stored(load_graph(path), "m.weight"), LINEAR_WEIGHT)


@pytest.mark.fault(38, 41)
@pytest.mark.parametrize("goal", ["secret", "blobs/secret", "other/blobs/" + "0" * 40, "blobs/" + "0" * 40])
def test_cache_link_outside_own_blobs_is_refused(tmp_path: Path, goal: str) -> None:
    path = cached(tmp_path)
    (tmp_path / "other/blobs").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(bytes(32))
    link = path.parent / "weights.data"
    link.unlink()
    if goal == "blobs/" + "0" * 40:  # a blob that is a link itself
        (tmp_path / goal).symlink_to(tmp_path / "outside")
    else:
        (tmp_path / goal).write_bytes(bytes(32))
    link.symlink_to(Path("../..") / goal)
    with pytest.raises(InputRefused, match="reached through a symbolic link"):
        load_graph(path)
