"""Merging into graphs on disk, with weights inside and beside the graph's file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lora_export import cli, formats, sums
from lora_export.errors import InputRefused
from lora_export.graph.onnx_file import writing
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.storage import atomic_output, block_copy
from lora_export.storage.hashes import file_hash, file_sha256
from support.exported_models import eager, exported, inputs, with_changes
from support.graphs import a_graph, contents, run, stored
from support.handmade import graph_file, peft_adapter
from support.merged_graphs import DATA, PARTS, WEIGHTS, A, B, K, folded_file, merge_into, packed_graph, saved_adapter
from support.small_graphs import random_adapter

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", 1000)


@DATA
def test_change_is_added_and_other_tensors_keep_bytes(tmp_path: Path, data: Any) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data)
    report = merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up", "down"))
    after = load_graph(tmp_path / "out/m.onnx")
    for name, before in WEIGHTS.items():
        expected = before if name == "kept.weight" else before + (B @ A).T
        assert np.array_equal(stored(after, name), expected), name
    assert [(result.weight, result.retention, result.noise) for result in report.results] == [
        ("up.weight", 1, 0), ("down.weight", 1, 0),
    ]  # fmt: skip
    assert report.copied == WEIGHTS["kept.weight"].nbytes


@DATA
def test_weights_stay_inside_or_beside_the_graph(tmp_path: Path, data: Any) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data)
    merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up"))
    written = sorted((tmp_path / "out").iterdir())
    if not data:
        assert [file.name for file in written] == ["m.onnx"]
        return
    digest = file_hash(written[1], "xxh3_128")
    assert [file.name for file in written] == ["m.onnx", atomic_output.data_name("m.onnx", digest)]
    assert written[1].stat().st_size < sum(weight.nbytes for weight in WEIGHTS.values()) + 3 * 4096


def test_exporter_notes_are_removed(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS)
    model = onnx.load(path)
    trace = 'File "/home/somebody/secret.py", line 1'
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value=trace)
    path.write_bytes(model.SerializeToString())
    merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up"))
    assert b"somebody" in path.read_bytes()
    assert b"somebody" not in (tmp_path / "out/m.onnx").read_bytes()


@DATA
def test_record_contains_hashes_of_files_and_adapters(tmp_path: Path, data: Any) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data, author="somebody")
    adapter = saved_adapter(tmp_path / "ad", "up")
    merge_into(path, tmp_path / "out", adapter, hashing="sha256")
    properties = load_graph(tmp_path / "out/m.onnx").metadata_props
    record = json.loads(properties.pop("lora_export"))
    assert properties == {"author": "somebody"}
    hashes = {file.name: {"sha256": file_sha256(file)} for file in tmp_path.iterdir() if file.is_file()}
    assert record["base"] == hashes
    assert [entry["sha256"] for entry in record["adapters"]] == [adapter.sha256]
    assert record["settings"]["lora"] == "merged"


def test_second_merge_of_same_adapter_is_refused(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS)
    first, second = saved_adapter(tmp_path / "first", "up"), saved_adapter(tmp_path / "second", "down", lora_alpha=4)
    merge_into(path, tmp_path / "one", first)
    merge_into(tmp_path / "one/m.onnx", tmp_path / "two", second)
    for adapter in (first, second):
        with pytest.raises(InputRefused, match=f"already contains the adapter {adapter.name}"):
            merge_into(tmp_path / "two/m.onnx", tmp_path / f"three {adapter.name}", adapter)


def test_shared_tensor_is_copied_for_each_layer(tmp_path: Path) -> None:
    square = RNG.integers(-9, 10, (40, 40)).astype(np.float32)
    model = a_graph(
        """
        g (float[N,40] x) => (float[N,40] y)
        <float[1,1] a.fc.weight = {1}, float[1,1] z.fc.weight = {1}>
        { [first] h = MatMul(x, a.fc.weight)
          [second] k = MatMul(h, a.fc.weight)
          [third] y = MatMul(k, z.fc.weight) }""",
        modules={"first": "a.fc", "second": "b.fc", "third": "z.fc"},
    )
    for name, value in model.graph.initializers.items():
        value.const_value = ir.Tensor(square + (name == "z.fc.weight"), name=name)
        value.shape = ir.Shape([40, 40])
    for folder, inline in (("inside", 1 << 30), ("beside", 0)):
        (tmp_path / folder).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "MAX_INLINE_BYTES", inline)
            save_graph(model, tmp_path / folder, "m.onnx")
        pair = (A, RNG.integers(-3, 4, (40, 2)))
        adapter = formats.load(peft_adapter(tmp_path / folder / "ad", {"b.fc": pair}))
        merge_into(tmp_path / folder / "m.onnx", tmp_path / folder / "out", adapter)
        after = load_graph(tmp_path / folder / "out/m.onnx")
        assert np.array_equal(stored(after, "a.fc.weight"), square)
        assert np.array_equal(stored(after, "z.fc.weight"), square + 1)
        assert np.array_equal(stored(after, "b.fc.weight"), square + (pair[1] @ A).T)
        record = json.loads(after.metadata_props["lora_export"])
        assert record["base"]["m.onnx"]["xxh3_128"] == file_hash(tmp_path / folder / "m.onnx", "xxh3_128")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sum_is_rounded_once_to_dtype_of_graph(tmp_path: Path, dtype: Any) -> None:
    rows = {name: (weight * 30).astype(dtype) for name, weight in WEIGHTS.items()}
    path = graph_file(tmp_path / "m.onnx", rows)
    merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up"))
    expected = (rows["up.weight"].astype(np.float64) + (B @ A).T).astype(dtype)
    assert stored(load_graph(tmp_path / "out/m.onnx"), "up.weight").tobytes() == expected.tobytes()


@DATA
def test_whole_tensor_replaces_weight(tmp_path: Path, data: Any) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data)
    whole = np.float32(RNG.normal(size=(40, 30)))
    adapter = formats.load(peft_adapter(tmp_path / "ad", {"up": (A, B)}, {"down.weight": whole}))
    report = merge_into(path, tmp_path / "out", adapter)
    assert np.array_equal(stored(load_graph(tmp_path / "out/m.onnx"), "down.weight"), whole)
    assert (report.replaced, [result.weight for result in report.results]) == (1, ["up.weight"])


@pytest.mark.parametrize("data", ["", "all.data"], ids=["inside", "beside"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_block_changes_and_neighbours_keep_bytes(
    tmp_path: Path, data: str, use_dora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, base = packed_graph(tmp_path / "folder", data)
    pairs = {f"attn.{name}": (A, RNG.integers(-3, 4, (len(PARTS[name]), 2))) for name in ("q_proj", "v_proj")}
    adapter = peft_adapter(tmp_path / "ad", pairs, use_dora=use_dora)
    lengths = {name: RNG.uniform(5, 9, len(PARTS[name.removeprefix("attn.")])).astype(np.float32) for name in pairs}
    if use_dora:
        file = adapter / "adapter_model.safetensors"
        vectors = {f"base_model.model.{name}.lora_magnitude_vector": length for name, length in lengths.items()}
        save_file(load_file(file) | vectors, file)
    out = tmp_path / "out.onnx"
    assert cli.run(["merge", str(graph), str(adapter), "-o", str(out), "--base", str(base)]) == 0, capsys.readouterr()
    expected = []
    for name, weight in PARTS.items():
        if f"attn.{name}" not in pairs:
            expected.append(weight)
            continue
        a, b = pairs[f"attn.{name}"]
        total = weight.astype(np.float64) + b @ a
        if use_dora:
            total *= (lengths[f"attn.{name}"] / np.linalg.norm(total, axis=1))[:, None]
        expected.append(total.astype(np.float32))
    after = stored(load_graph(out), "packed_1").T
    if use_dora:
        np.testing.assert_allclose(after, np.concatenate(expected), rtol=1e-6)
        assert after[30:50].tobytes() == K.tobytes()
    else:
        assert np.array_equal(after, np.concatenate(expected))
    assert np.array_equal(stored(load_graph(out), "val_2"), stored(load_graph(graph), "val_2"))


@pytest.mark.parametrize("inline", [0, 1 << 30], ids=["beside", "inside"])
@pytest.mark.parametrize("name", ["encoder", "bert"])
def test_merged_export_equals_folded_one_and_pytorch(
    name: str, inline: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", inline)
    monkeypatch.setattr(block_copy, "BLOCK", 1 << 21)  # products of smaller blocks may be rounded differently
    made = exported(name)
    adapter, changes = random_adapter(made.graph)
    save_graph(made.graph, tmp_path, "m.onnx")
    expected = folded_file(tmp_path / "m.onnx", adapter)
    merge_into(tmp_path / "m.onnx", tmp_path / "out", adapter)
    after = load_graph(tmp_path / "out/m.onnx")
    assert contents(after) == contents(expected)
    reference = with_changes(made.module, changes)
    feeds = inputs(name, 3, 12, seed=2)
    output = run(after, **{key: value.numpy() for key, value in feeds.items()})
    for key, value in eager(reference, feeds).items():
        np.testing.assert_allclose(output[key], value, rtol=1e-4, atol=1e-5)


def a_nan(weights: dict[str, NDArray[Any]]) -> None:
    weights["up.weight"][3, 4] = np.nan


def too_large(weights: dict[str, NDArray[Any]]) -> None:
    for name in weights:
        weights[name] = np.full_like(weights[name], 65504, dtype=np.float16)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [(a_nan, r"up.weight: the base holds 1 value that is not finite"), (too_large, r"up.weight: .* exceed 65504")],
)
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, NDArray[Any]]], None], problem: str
) -> None:
    weights = {name: weight.copy() for name, weight in WEIGHTS.items()}
    spoil(weights)
    path = graph_file(tmp_path / "m.onnx", weights)
    with pytest.raises(InputRefused, match=problem):
        merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up", lora_alpha=200))


@DATA
@pytest.mark.usefixtures("by_numpy")
def test_file_that_changes_during_merge_is_refused(
    tmp_path: Path, data: str | Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data)
    touched = path if not data else tmp_path / (data if isinstance(data, str) else data["kept.weight"])
    add = sums.add_into

    def touch_and_add(*arrays: Any) -> None:
        touched.touch()
        add(*arrays)

    monkeypatch.setattr(sums, "add_into", touch_and_add)
    with pytest.raises(InputRefused, match=f"{touched.name} changed while it was being merged"):
        merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up"))
