"""Read .pt2 files that are not trusted: their contents are described or refused, and never run.

The files begin as torch wrote them; then one thing in them is changed. `verify` is run on each as the candidate and
as MODEL: exit code 3, one reason, nothing on stdout, no payload.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.models.pt2 import program, reader
from lora_export.models.pt2.graph_json import Symbol
from support.factories import Wide, Worded
from support.handmade import Payload
from support.hostile_programs import Change, changed, nodes, payload, refused, spoiled
from support.programs import export, ids, noise, padded, rewritten


def test_a_file_is_read_as_torch_wrote_it(good: Path) -> None:
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
def test_weights_of_every_dtype_are_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    eager = Wide().to(dtype)
    eager.register_buffer("odd", torch.tensor([[1, 2, 3], [4, 5, 6]]).T)  # strided
    eager.register_buffer("flags", torch.tensor([True, False]))
    eager.register_buffer("none", torch.zeros(0, 3))
    eager.up.weight.data = eager.up.weight.data.T.contiguous().T  # as a merge of transposed weights may leave it
    path = export(eager, {"rows": noise(2, 5, 64).to(dtype)}, tmp_path / "w.pt2")
    read = program.load_program(path).state_dict()
    assert read.keys() == eager.state_dict().keys()
    for name, tensor in eager.state_dict().items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_the_pickled_sample_inputs_are_not_opened(good: Path, tmp_path: Path) -> None:
    samples = "data/sample_inputs/model.pt"
    path = rewritten(good, tmp_path / "evil.pt2", {samples: payload(tmp_path)})
    with pytest.raises(Exception):  # noqa: B017 - torch.export.load ends in whatever error, once the payload has run
        torch.export.load(path)
    assert (tmp_path / "payload-ran").exists(), "or the tests below would prove nothing"
    (tmp_path / "payload-ran").unlink()
    assert torch.equal(
        program.load_program(path)(ids=ids(2, 5) % 10, mask=padded(2, 5)),
        program.load_program(good)(ids=ids(2, 5) % 10, mask=padded(2, 5)),
    )
    assert not (tmp_path / "payload-ran").exists()


# --- Pickles and code ---


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
    assert program.load_program(path)(ids=ids(3, 4) % 10, mask=padded(3, 4)).shape == (3, 4)
    names = [node.name for node in reader.read(path).graph.nodes]
    assert names == [str(number) for number in range(len(names))]  # in messages, they could pass for lines of ours
    assert not (tmp_path / "payload-ran").exists()


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


# --- Signature and ranges ---


WRONG = [
    (spoiled("schema_version", value={"major": 9, "minor": 0}), "version 9 of torch's schema"),
    (spoiled("schema_version", value=[]), "expected a JSON object"),
    (spoiled("graph_module", value="evil"), "expected a JSON object"),
    (spoiled("graph_module", "signature", "input_specs", value=[]), "its signature names 0 inputs"),
    (spoiled("graph_module", "module_call_graph", value=[]), "how the program is called"),
    (spoiled("graph_module", "signature", "output_specs", value=[]), "its signature names 0"),
    (spoiled("graph_module", "signature", "input_specs", 0, value={"custom_obj": {}}), "'custom_obj'"),
    (
        spoiled("graph_module", "signature", "input_specs", 0, "parameter", "parameter_name", value="no"),
        "is not stored",
    ),
    (spoiled("range_constraints", value={"s0": 3}), "expected a JSON object"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_json_that_torch_would_not_write_is_refused(good: Path, tmp_path: Path, change: Change, problem: str) -> None:
    assert problem in refused(changed(good, tmp_path, change))


# --- Stored tensors ---


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
        (tensor_meta(sizes=[number(1 << 40), number(1 << 20)], strides=[number(0), number(0)]), "has not as many"),
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
def test_a_tensor_larger_than_its_bytes_is_refused(good: Path, tmp_path: Path, change: Change, problem: str) -> None:
    name = "data/weights/model_weights_config.json"
    with zipfile.ZipFile(good) as archive:
        root = archive.namelist()[0].partition("/")[0]
        config = json.loads(archive.read(f"{root}/{name}"))
    change(config)
    assert problem in refused(rewritten(good, tmp_path / "evil.pt2", {name: json.dumps(config).encode()}))


def test_a_tensor_with_a_partial_element_is_refused(good: Path, tmp_path: Path) -> None:
    members: dict[str, bytes | None] = {"data/weights/weight_0": bytes(10 * 4 * 4 + 1)}
    assert "has not as many" in refused(rewritten(good, tmp_path / "evil.pt2", members))
