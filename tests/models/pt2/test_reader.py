"""Reading .pt2 files that nobody vouches for: what is in them is described or refused, and never run.

The files begin as torch wrote them; then one thing in them is changed. `verify` is run on each as the candidate and
as MODEL: exit code 3, one reason, nothing on stdout, no payload.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fuzz.targets import bounded, run
from lora_export.errors import InputRefused
from lora_export.models.load import load_model
from lora_export.models.pt2 import allowed_operators, program, reader
from lora_export.models.pt2.program_types import Symbol
from support import FACTORIES
from support.factories import Wide, Worded
from support.handmade import Payload
from support.programs import export, graph_of, ids, noise, padded, rewritten

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    inputs = {"ids": ids(2, 5) % 10, "mask": padded(2, 5)}
    return export(Worded(), inputs, tmp_path_factory.mktemp("good") / "good.pt2", dynamic=2)


def payload(place: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Payload(place / "payload-ran"), file)
    return file.getvalue()


def refused(path: Path, *, of: str = "worded") -> str:
    """Why verify refuses a file on either side; nothing ran, nothing was said, and nothing is left behind."""
    before = sorted(path.parent.rglob("*"))
    model = f"{FACTORIES}:{of}"
    told = []
    for arguments in ((path, "--model", model), (path, "--model", path)):
        code, said, told_now = run("verify", *arguments)
        assert (code, said) == (3, ""), told_now
        assert told_now.startswith("Error: ") and len(told_now) < 2000 and "Traceback" not in told_now
        told.append(told_now)
    assert sorted(path.parent.rglob("*")) == before
    assert not (path.parent / "payload-ran").exists()
    return told[-1]


def changed(good: Path, to: Path, change: Change) -> Path:
    """The file with another graph."""
    name, graph = graph_of(good)
    change(graph)
    return rewritten(good, to / "evil.pt2", {name: json.dumps(graph).encode()})


def nodes(graph: dict[str, Any]) -> list[dict[str, Any]]:
    return graph["graph_module"]["graph"]["nodes"]  # type: ignore[no-any-return]


# --- what is read ----------------------------------------------------------------------------------


def test_a_file_is_described_as_torch_wrote_it(good: Path) -> None:
    found = reader.read(good)
    assert list(found.inputs) == ["ids", "mask"]
    assert [tensor.dtype for tensor in found.inputs.values()] == ["int64", "int64"]
    (batch, length), (_, other) = (tensor.sizes for tensor in found.inputs.values())
    assert isinstance(batch, Symbol) and isinstance(length, Symbol)
    assert (batch.hint, length.hint, length.name) == (2, 5, other.name)  # type: ignore[union-attr]
    state = Worded().state_dict()
    assert {tensor.name: tensor.data.sizes for tensor in found.tensors} == {k: tuple(v.shape) for k, v in state.items()}
    assert found.outputs == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_are_read_bit_for_bit_whatever_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    eager = Wide().to(dtype)
    eager.register_buffer("odd", torch.tensor([[1, 2, 3], [4, 5, 6]]).T)  # strided
    eager.register_buffer("flags", torch.tensor([True, False]))
    eager.register_buffer("none", torch.zeros(0, 3))
    eager.up.weight.data = eager.up.weight.data.T.contiguous().T  # as a merge of transposed weights may leave it
    path = export(eager, {"rows": noise(2, 5, 64).to(dtype)}, tmp_path / "w.pt2")
    read = program.load(path).state_dict()
    assert read.keys() == eager.state_dict().keys()
    for name, tensor in eager.state_dict().items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_reading_opens_no_pickle_though_every_file_has_one(good: Path, tmp_path: Path) -> None:
    samples = "data/sample_inputs/model.pt"
    path = rewritten(good, tmp_path / "evil.pt2", {samples: payload(tmp_path)})
    with pytest.raises(Exception):  # noqa: B017 - torch.export.load ends in whatever error, once the payload has run
        torch.export.load(path)
    assert (tmp_path / "payload-ran").exists(), "or the tests below would prove nothing"
    (tmp_path / "payload-ran").unlink()
    assert torch.equal(
        program.load(path)(ids=ids(2, 5) % 10, mask=padded(2, 5)),
        program.load(good)(ids=ids(2, 5) % 10, mask=padded(2, 5)),
    )
    assert not (tmp_path / "payload-ran").exists()


# --- pickles and code ------------------------------------------------------------------------------


@pytest.mark.fault(25)
@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_a_tensor_that_is_a_pickle_is_refused(good: Path, tmp_path: Path, folder: str) -> None:
    entry = {"path_name": "weight_0" if folder == "weights" else "tensor_0", "is_param": False, "use_pickle": True}
    config = {"config": {"words.weight": entry | {"tensor_meta": None}}}
    members = {
        f"data/{folder}/model_{folder}_config.json": json.dumps(config).encode(),
        f"data/{folder}/{entry['path_name']}": payload(tmp_path),
    }
    assert "stored as a pickle" in refused(rewritten(good, tmp_path / "evil.pt2", members))


@pytest.mark.fault(25)
@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_pickles_of_an_older_torch_are_refused(good: Path, tmp_path: Path, folder: str) -> None:
    members = {f"data/{folder}/model_{folder}_config.json": None, f"data/{folder}/model.pt": payload(tmp_path)}
    assert f"pickled the {folder}" in refused(rewritten(good, tmp_path / "evil.pt2", members))


@pytest.mark.fault(25)
@pytest.mark.parametrize("content", ["pickle", "torch.save", "zip of pickles"])
def test_a_pickle_with_the_suffix_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "evil.pt2"
    if content == "zip of pickles":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("serialized_exported_program.json", "serialized_state_dict.pt", "version"):
                archive.writestr(name, payload(tmp_path))
    else:
        path.write_bytes(
            payload(tmp_path) if content == "torch.save" else pickle.dumps(Payload(tmp_path / "payload-ran"))
        )
    assert ".pt2 file" in refused(path) or "folder" in refused(path)


TARGETS = [
    "os.system",
    "builtins.eval",
    "torch.hub.load",
    "torch.load",
    "torch.ops.load_library",
    "torch.ops.aten",
    "torch.ops.aten.linear",
    "torch.ops.aten.linear.default.__class__",
    "torch.ops.aten.__class__.default",
    "torch.ops.aten.__getattr__.default",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.set_.source_Storage",
    "torch.ops.aten.resize_.default",
    "torch.ops.aten.save.default",
    "torch.ops.aten.add.out",
    "torch.ops.aten.add.str",
    "torch.ops.aten.mul.left_t",
    "torch.ops.aten.view.dtype",
    "torch.ops.aten.LINEAR.default",
    "torch.ops.aten.linear.default ",
    "torch.ops.aten.lіnear.default",
    "torch.ops.aten.linear.nonexistent",
    "torch.ops.prim.rpc_async.default",
    "torch.ops.inductor.resize_storage_bytes_.default",
    "torch.ops.mylib.evil.default",
    "torch.ops.higher_order.cond",
    "torch.ops.higher_order.flat_apply",
    "torch.ops.higher_order.wrap_with_autocast",
    "_operator.call",
    "_operator.methodcaller",
    "_operator.lshift",
    "math.factorial",
    "#extension:evil",
    "",
]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_that_is_not_on_the_list_is_refused_by_name(good: Path, tmp_path: Path, target: str) -> None:
    def change(graph: dict[str, Any]) -> None:
        nodes(graph)[-1]["target"] = target

    told = refused(changed(good, tmp_path, change))
    assert "node" in told and (
        "not among the operators" in told
        or "supported" in told
        or "no operator" in told
        or "no graph where it should" in told
    )


def test_no_operator_of_the_list_touches_files_or_memory() -> None:
    names = allowed_operators.OPERATORS | {name.partition(".")[0] for name in allowed_operators.REPLACEMENTS}
    touching = ("file", "storage", "set_", "resize", "rand", "normal", "bernoulli", "load", "save", "pin_memory")
    assert not [name for name in names if name != "sym_storage_offset" and any(word in name for word in touching)]
    for name in names:
        for overload in getattr(torch.ops.aten, name).overloads():
            target = f"torch.ops.aten.{name}.{overload}"
            try:
                allowed_operators.resolve(target, "here")
            except InputRefused:
                continue
            kinds = {
                str(argument.type) for argument in getattr(getattr(torch.ops.aten, name), overload)._schema.arguments
            }
            assert not kinds & {"Storage", "Stream", "Any", "__torch__.torch.classes"}, target


EXPRESSIONS = [
    "__import__('os').system('touch payload-ran')",
    "Symbol('s0').__class__",
    "Symbol('s0', positive=open('payload-ran', 'w'))",
    "[].__class__.__base__.__subclasses__()",
    "9**9**9**9",
    "Integer(" * 500 + "1" + ")" * 500,
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_size_that_is_an_expression_is_not_evaluated(
    good: Path, tmp_path: Path, expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(graph: dict[str, Any]) -> None:
        for there in graph["graph_module"]["graph"]["tensor_values"].values():
            for size in there["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = expression

    path = changed(good, tmp_path, change)
    code, _, told = run("verify", path, "--model", path)
    assert code == 3 and "is computed from others" in told
    module = program.load(path)  # as a candidate its own sizes tell, and the expression is nobody's
    assert module(ids=ids(3, 4) % 10, mask=padded(3, 4)).shape == (3, 4)
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("guard", ["open('payload-ran', 'w')", "__import__('os').abort()", "("])
def test_guards_and_names_are_not_compiled(
    good: Path, tmp_path: Path, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(graph: dict[str, Any]) -> None:
        graph["guards_code"] = [guard]
        for node in nodes(graph):
            node["name"] = f"x\n{guard}\n#"
            node["metadata"] = dict.fromkeys(("stack_trace", "nn_module_stack", "torch_fn", "from_node"), guard)

    path = changed(good, tmp_path, change)
    assert program.load(path)(ids=ids(3, 4) % 10, mask=padded(3, 4)).shape == (3, 4)
    names = [node.name for node in reader.read(path).graph.nodes]
    assert names == [str(number) for number in range(len(names))]  # in messages, they could pass for lines of ours
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize(
    "kind", ["os.system", "subprocess.Popen", "evil_module.Evil", "builtins.eval", "transformers_evil.X"]
)
@pytest.mark.parametrize("spec", ["in_spec", "out_spec"])
def test_a_structure_whose_type_names_code_is_refused_and_imports_nothing(
    good: Path, tmp_path: Path, spec: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'payload-ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    leaf = {"type": None, "context": None, "children_spec": []}
    structure = json.dumps([1, {"type": kind, "context": '["a"]', "children_spec": [leaf]}])

    def change(graph: dict[str, Any]) -> None:
        graph["graph_module"]["module_call_graph"][0]["signature"][spec] = structure

    assert f"{kind!r} is no supported container" in refused(changed(good, tmp_path, change))


# --- the archive -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 21, 100, 0.5, -1])
def test_a_file_that_is_cut_short_is_refused(good: Path, tmp_path: Path, length: float) -> None:
    content = good.read_bytes()
    kept = int(length * len(content)) if isinstance(length, float) else length % len(content)
    (tmp_path / "evil.pt2").write_bytes(content[:kept])
    assert "is no .pt2 file" in refused(tmp_path / "evil.pt2")


def test_a_flipped_bit_in_a_weight_is_found(good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(good) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("weights/weight_1"))
    content = bytearray(good.read_bytes())
    name, extra = struct.unpack("<HH", content[info.header_offset + 26 : info.header_offset + 30])
    content[info.header_offset + 30 + name + extra + 5] ^= 1
    (tmp_path / "evil.pt2").write_bytes(content)
    assert "is damaged: Bad CRC-32" in refused(tmp_path / "evil.pt2")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../evil", "leads out of its folder"),
        ("good/../../evil", "leads out of its folder"),
        ("/etc/evil", "leads out of its folder"),
        ("good/a\\b", "leads out of its folder"),
        ("good//evil", "leads out of its folder"),
        ("evil", "leads out of its folder"),
        ("other/evil", "2 folders at its top"),
        ("good/data/weights/weight_0", "more than once"),
        ("good/\x1b[2J", "control characters"),
    ],
)
def test_names_that_no_writer_gives_are_refused(good: Path, tmp_path: Path, name: str, problem: str) -> None:
    with zipfile.ZipFile(good) as old:
        root = old.namelist()[0].partition("/")[0]
    path = rewritten(good, tmp_path / "evil.pt2", {})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns() if "weight_0" in name else no_warning():
        archive.writestr(name.replace("good", root), b"evil")
    assert problem in refused(path)
    assert not (tmp_path.parent / "evil").exists()


class no_warning:  # noqa: N801 - used as a function is
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_a_member_that_is_a_link_is_refused(good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path / "evil.pt2", {"data/weights/weight_0": None})
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        info = zipfile.ZipInfo(f"{root}/data/weights/weight_0")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, b"/etc/passwd")
    assert "its member data/weights/weight_0 is a link" in refused(path)


def test_a_member_that_inflates_is_refused_at_little_cost(good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path / "evil.pt2", {"data/weights/weight_0": None})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        with archive.open(f"{root}/data/weights/weight_0", "w", force_zip64=True) as member:
            for _ in range(30):
                member.write(bytes(4_000_000))
    assert path.stat().st_size < 300_000
    assert "is compressed" in refused(path)


@pytest.mark.parametrize("claimed", [0xFFFFFFF0, 1 << 20, 1])
def test_a_member_that_lies_about_its_size_is_refused(good: Path, tmp_path: Path, claimed: int) -> None:
    with zipfile.ZipFile(good) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("models/model.json"))
    content = bytearray(good.read_bytes())
    place = content.rindex(info.filename.encode()) - 46  # of its entry in the directory
    content[place + 20 : place + 28] = struct.pack("<II", claimed, claimed)
    (tmp_path / "evil.pt2").write_bytes(content)
    told = refused(tmp_path / "evil.pt2")
    assert "claim" in told or "is damaged" in told or "is cut short" in told or "Overlapped" in told


def test_members_that_lie_on_each_other_are_refused(good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path / "evil.pt2", {"data/weights/weight_9": bytes(1_000_000)})
    with zipfile.ZipFile(path, "a") as archive:
        last = archive.filelist[-1]
        for number in range(1000):
            twin = copy.copy(last)
            twin.filename = twin.orig_filename = f"{last.filename}_{number}"
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]
    assert "its members claim 1,0" in refused(path)


def test_a_directory_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt2"
    size = 3 << 30
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 9, 9, size, 0, 0))
    assert "claims more bytes than such a file needs" in refused(path)


@pytest.mark.parametrize("size", [20 << 30, 0])
def test_a_file_that_takes_no_room_on_the_disk_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "evil.pt2").touch()
    os.truncate(tmp_path / "evil.pt2", size)
    assert "is no .pt2 file" in refused(tmp_path / "evil.pt2")


@pytest.mark.fault(41)
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "folder"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "evil.pt2"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    with bounded(), pytest.raises(InputRefused, match="regular file"):
        reader.read(path)


# --- the JSON --------------------------------------------------------------------------------------


def spoil(*path: Any, value: Any) -> Change:
    def change(graph: dict[str, Any]) -> None:
        there: Any = graph
        for step in path[:-1]:
            there = there[step]
        there[path[-1]] = value

    return change


GRAPH = ("graph_module", "graph")
NODE = (*GRAPH, "nodes", 0)
WRONG = [
    (spoil("schema_version", value={"major": 9, "minor": 0}), "version 9 of torch's schema"),
    (spoil("schema_version", value=[]), "expected a JSON object"),
    (spoil("graph_module", value="evil"), "expected a JSON object"),
    (spoil(*GRAPH, "nodes", value={}), "expected a list"),
    (spoil(*GRAPH, "nodes", 0, value=7), "expected a JSON object"),
    (spoil(*NODE, "target", value=7), "expected a string"),
    (spoil(*NODE, "inputs", value=None), "expected a list"),
    (spoil(*NODE, "inputs", 0, "arg", value={}), "expected one field"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_tensor": {"name": "nobody"}}), "which nothing before it makes"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_tensor": 3}), "expected a JSON object"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_int": True}), "expected an integer"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_int": 1 << 70}), "an integer of 71 bits is too large"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_float": "1e5"}), "expected a number"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_scalar_type": 99}), "torch's dtype 99"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_scalar_type": [1]}), "expected an integer"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_memory_format": 77}), "77 is no memory format"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_layout": 1}), "only dense tensors"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_custom_obj": {"name": "x", "class_fqn": "os.system"}}), "custom_obj"),
    (spoil(*NODE, "inputs", 0, "arg", value={"as_operator": "os.system"}), "as_operator"),
    (spoil(*NODE, "inputs", 0, "name", value="evil"), "has no argument evil"),
    (spoil(*NODE, "outputs", value=[{"as_tensor": {"name": "ids"}}]), "ids is made more than once"),
    (spoil(*NODE, "outputs", value=[{"as_custom_obj": {}}]), "which is not supported"),
    (spoil(*GRAPH, "inputs", value=[]), "which nothing before it makes"),
    (spoil("graph_module", "signature", "input_specs", value=[]), "its signature names 0 inputs"),
    (spoil(*GRAPH, "outputs", value=[{"as_tensor": {"name": "nobody"}}]), "which nothing before it makes"),
    (spoil(*GRAPH, "tensor_values", value={}), "which is no tensor"),
    (spoil("graph_module", "module_call_graph", value=[]), "how the program is called"),
    (spoil("graph_module", "signature", "output_specs", value=[]), "its signature names 0"),
    (spoil("graph_module", "signature", "input_specs", 0, value={"custom_obj": {}}), "'custom_obj'"),
    (spoil("graph_module", "signature", "input_specs", 0, "parameter", "parameter_name", value="no"), "is not stored"),
    (spoil("range_constraints", value={"s0": 3}), "expected a JSON object"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_what_torch_would_not_write_is_refused(good: Path, tmp_path: Path, change: Change, problem: str) -> None:
    assert problem in refused(changed(good, tmp_path, change))


def renamed(name: str) -> Callable[[Path, Path], Path]:
    def change(good: Path, to: Path) -> Path:
        member, graph = graph_of(good)
        config = "data/weights/model_weights_config.json"
        with zipfile.ZipFile(good) as archive:
            root = archive.namelist()[0].partition("/")[0]
            told = json.loads(archive.read(f"{root}/{config}"))
        spec = graph["graph_module"]["signature"]["input_specs"][0]["parameter"]
        told["config"][name] = told["config"].pop(spec["parameter_name"])
        spec["parameter_name"] = name
        members = {member: json.dumps(graph).encode(), config: json.dumps(told).encode()}
        return rewritten(good, to / "evil.pt2", members)

    return change


@pytest.mark.parametrize(
    "name",
    [
        *(
            "forward.weight",
            "__class__.weight",
            "_modules.x",
            "a..b",
            "training",
            "dense",
            ".",
            "",
            "unobserved_weights",
            "description",
        ),
        "a." * 200 + "weight",
    ],
)
def test_names_that_would_stand_for_something_of_the_module_are_refused(good: Path, tmp_path: Path, name: str) -> None:
    told = refused(renamed(name)(good, tmp_path))
    assert "cannot be a" in told


def test_names_with_control_characters_are_refused(good: Path, tmp_path: Path) -> None:
    assert "control characters" in refused(renamed("\x1b[2J.weight")(good, tmp_path))


def tensor_meta(**fields: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["config"]["words.weight"]["tensor_meta"].update(fields)

    return change


def number(value: int) -> dict[str, int]:
    return {"as_int": value}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (tensor_meta(sizes=[number(1 << 40), number(4)]), "has not as many"),
        (tensor_meta(sizes=[number(1 << 62), number(1 << 62)]), "has not as many"),
        (
            tensor_meta(sizes=[number(1 << 40), number(1 << 20)], strides=[number(0), number(0)]),
            "has not as many",
        ),
        (tensor_meta(storage_offset=number(39)), "has not as many"),
        (tensor_meta(strides=[number(5), number(1)]), "has not as many"),
        (tensor_meta(strides=[number(-4), number(1)]), "a size is negative"),
        (tensor_meta(sizes=[number(-10), number(-4)]), "a size is negative"),
        (tensor_meta(strides=[number(1)]), "the sizes, strides and offset"),
        (tensor_meta(sizes=[{"as_expr": {"expr_str": "s0"}}, number(4)]), "the sizes, strides and offset"),
        (tensor_meta(sizes=[number(1 << 62), number(9), number(0)], strides=[number(1)] * 3), "cannot be a tensor"),
        (tensor_meta(dtype=11), "torch's dtype 11"),
        (tensor_meta(layout=1), "is no dense tensor"),
        (
            lambda config: config["config"]["words.weight"].update(path_name="../../models/model.json"),
            "should be stored in",
        ),
        (lambda config: config["config"]["words.weight"].update(path_name=7), "expected a string"),
        (lambda config: config.update(config=[]), "expected a JSON object"),
    ],
)
def test_a_tensor_that_its_bytes_do_not_hold_is_refused(
    good: Path, tmp_path: Path, change: Change, problem: str
) -> None:
    name = "data/weights/model_weights_config.json"
    with zipfile.ZipFile(good) as archive:
        root = archive.namelist()[0].partition("/")[0]
        config = json.loads(archive.read(f"{root}/{name}"))
    change(config)
    assert problem in refused(rewritten(good, tmp_path / "evil.pt2", {name: json.dumps(config).encode()}))


def test_a_tensor_whose_bytes_are_no_whole_numbers_is_refused(good: Path, tmp_path: Path) -> None:
    members: dict[str, bytes | None] = {"data/weights/weight_0": bytes(10 * 4 * 4 + 1)}
    assert "has not as many" in refused(rewritten(good, tmp_path / "evil.pt2", members))


def hints(value: int) -> Change:
    def change(graph: dict[str, Any]) -> None:
        for there in graph["graph_module"]["graph"]["tensor_values"].values():
            for size in there["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["hint"] = {"as_int": value}

    return change


def sizes(*values: int) -> Change:
    def change(graph: dict[str, Any]) -> None:
        for name in ("ids", "mask"):
            there = graph["graph_module"]["graph"]["tensor_values"][name]
            there["sizes"] = [{"as_int": value} for value in values]

    return change


def ranges(low: int) -> Change:
    def change(graph: dict[str, Any]) -> None:
        graph["range_constraints"] = {name: {"min_val": low, "max_val": None} for name in graph["range_constraints"]}

    return change


def no_inputs(graph: dict[str, Any]) -> None:
    inner, specs = graph["graph_module"]["graph"], graph["graph_module"]["signature"]["input_specs"]
    own = [number for number, spec in enumerate(specs) if "user_input" not in spec]
    inner["inputs"], specs[:] = [inner["inputs"][number] for number in own], [specs[number] for number in own]
    inner["nodes"], inner["outputs"] = [], inner["inputs"][:1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (sizes(1 << 40, 4), "too large to run"),
        (ranges(1 << 40), "too large to run"),
        (no_inputs, "takes 0 inputs"),
    ],
)
def test_inputs_that_cannot_be_made_are_refused(good: Path, tmp_path: Path, change: Change, problem: str) -> None:
    path = changed(good, tmp_path, change)
    code, said, told = run("verify", path, "--model", path)
    assert (code, said) == (3, "") and problem in told, told


@pytest.mark.parametrize("hint", [1 << 40, -5, 0])
def test_a_hint_is_believed_by_nobody(good: Path, tmp_path: Path, hint: int) -> None:
    base = load_model(str(changed(good, tmp_path, hints(hint))))
    assert [there["sequence"] for there in base.checked_sizes({})] == [7, 16, 29]
    assert all(size > 0 for size in base.traced_sizes.values())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"{" + b'"a":{' * 50_000, "is not JSON"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "deep"),
        (b'{"a": 1, "a": 2}', "more than once"),
        (b'{"a": [' + b"{}," * 1_000_000 + b"{}]}", "more than 1,000,000 objects"),
        (b"[]", "is not a JSON object"),
        (b"\xff\xfe{}", "is not JSON"),
    ],
)
def test_json_that_is_none_is_refused_at_little_cost(good: Path, tmp_path: Path, text: bytes, problem: str) -> None:
    assert problem in refused(rewritten(good, tmp_path / "evil.pt2", {"models/model.json": text}))


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"archive_format": b"tar"}, "its archive_format is another"),
        ({"archive_version": b"1"}, "archive of version"),
        ({"archive_format": None}, "is no .pt2 file that torch.export.save wrote"),
        ({"byteorder": b"big"}, "a byte order other than little-endian"),
        ({"data/aotinductor/model/a.so": b"evil"}, "contains compiled code"),
        ({"models/model.json": None}, "contains 0 exported programs"),
        ({"models/other.json": b"{}"}, "contains 2 exported programs"),
    ],
)
def test_an_archive_of_another_kind_is_refused(
    good: Path, tmp_path: Path, members: dict[str, bytes | None], problem: str
) -> None:
    assert problem in refused(rewritten(good, tmp_path / "evil.pt2", members))


# --- while it runs ---------------------------------------------------------------------------------


def test_a_size_that_would_grow_beyond_number_stops_the_run(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum() + torch.ones(x.shape[0] * 2 + 1)

    good = export(Sizes(), {"x": noise(2, 4)}, tmp_path / "sizes.pt2")

    def change(graph: dict[str, Any]) -> None:
        for node in nodes(graph):
            if node["target"] == "_operator.mul":
                node["target"] = "_operator.pow"
                node["inputs"][-1]["arg"] = {"as_int": 1 << 40}

    module = program.load(changed(good, tmp_path, change))
    with bounded(), pytest.raises(Exception, match="to the power of 1099511627776 is too large"):
        module(x=torch.ones(3, 4))


def test_a_candidate_of_another_suffix_is_told_what_is_taken(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.bin")
    code, _, told = run("verify", tmp_path / "x.bin", "--model", f"{FACTORIES}:worded")
    assert code == 3 and ".onnx, .pt, .pt2 or .safetensors file" in told
    code, _, told = run("verify", tmp_path / "x.bin", "--model", tmp_path / "nothing")
    assert code == 3 and "or a .pt2 file" in told


def test_a_number_that_is_not_finite_is_read_as_torch_spells_it(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(x > 0, float("-inf")).masked_fill(x == 0, float("inf"))

    path = export(Masked(), {"x": noise(2, 4)}, tmp_path / "masked.pt2")
    given = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    assert program.load(path)(x=given).tolist() == [[-np.inf, np.inf, -1.0, -np.inf]]
