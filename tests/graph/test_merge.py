"""Plans over graphs on disk: what `fold` does in memory, byte for byte, while the weights pass by."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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

from lora_export import cli, formats, plan, sums
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.fold import fold
from lora_export.graph.merge.merge_graph import merge_graph
from lora_export.graph.onnx_file import writing
from lora_export.graph.onnx_file.reading import load_graph, open_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter
from lora_export.storage import atomic_output, block_copy
from lora_export.storage.hashes import file_hash, file_sha256
from lora_export.weights.merge_report import MergeReport
from support.exported_models import eager, exported, inputs, with_changes
from support.folder_contents import folder_contents
from support.graphs import a_graph, contents, quantised, run, stored
from support.handmade import base_file, graph_file, peft_adapter
from support.small_graphs import random_adapter

RNG = np.random.default_rng(0)
A, B = RNG.integers(-3, 4, (2, 40)), RNG.integers(-3, 4, (30, 2))  # (rank, in), (out, rank)
WEIGHTS = {
    name: RNG.integers(-9, 10, shape).astype(np.float32)
    for name, shape in {"up.weight": (40, 30), "kept.weight": (40, 50), "down.weight": (40, 30)}.items()
}
DATA = pytest.mark.parametrize(
    "data",
    ["", "all.data", {"up.weight": "a", "kept.weight": "b", "down.weight": "a"}],
    ids=["inside", "beside", "in two files beside"],
)


def merged(path: Path, stage: Path, *adapters: Adapter, **options: Any) -> MergeReport:
    """`adapters` merged into a graph's file; the output is called as the input."""
    graph = open_graph(path)
    sites = find_sites(graph.model)
    stage.mkdir()
    return merge_graph(plan.make(adapters, sites.specs), graph, sites, stage, file_name=path.name, **options)


def folded(path: Path, *adapters: Adapter) -> ir.Model:
    model = load_graph(path)
    sites = find_sites(model)
    fold(model, sites, plan.make(adapters, sites.specs))
    return model


def an_adapter(folder: Path, *modules: str, **config: Any) -> Adapter:
    return formats.load(peft_adapter(folder, dict.fromkeys(modules, (A, B)), **config))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", 1000)


# --- by hand ---


@DATA
def test_the_change_is_added_and_everything_else_keeps_its_bytes(tmp_path: Path, data: Any) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data)
    report = merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up", "down"))
    after = load_graph(tmp_path / "out/m.onnx")
    for name, before in WEIGHTS.items():
        expected = before if name == "kept.weight" else before + (B @ A).T
        assert np.array_equal(stored(after, name), expected), name
    assert [(there.weight, there.retention, there.noise) for there in report.results] == [
        ("up.weight", 1, 0), ("down.weight", 1, 0),
    ]  # fmt: skip
    assert report.copied == WEIGHTS["kept.weight"].nbytes


@DATA
def test_what_was_inside_stays_inside_and_what_was_beside_is_named_by_its_content(tmp_path: Path, data: Any) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data)
    merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up"))
    written = sorted((tmp_path / "out").iterdir())
    if not data:
        assert [file.name for file in written] == ["m.onnx"]
        return
    digest = file_hash(written[1], "xxh3_128")
    assert [file.name for file in written] == ["m.onnx", atomic_output.data_name("m.onnx", digest)]
    assert written[1].stat().st_size < sum(weight.nbytes for weight in WEIGHTS.values()) + 3 * 4096


def test_bytes_lie_in_their_pages_as_they_did_and_dead_ones_go(tmp_path: Path) -> None:
    (tmp_path / "all.data").write_bytes(b"dead" * 2500)
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data="all.data")
    merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up"))
    places = [
        {name: value.const_value.offset % 4096 for name, value in load_graph(there).graph.initializers.items()}
        for there in (path, tmp_path / "out/m.onnx")
    ]
    assert places[0] == places[1] and len(set(places[0].values())) == 3
    (data,) = (tmp_path / "out").glob("*.data")
    assert data.stat().st_size == (tmp_path / "all.data").stat().st_size - 2 * 4096
    assert b"dead" not in data.read_bytes()


def test_what_lies_between_two_weights_that_stay_is_left_out(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data="all.data")
    model, data = onnx.load(path, load_external_data=False), tmp_path / "all.data"
    tensor = {tensor.name: tensor for tensor in model.graph.initializer}["kept.weight"]
    start = data.stat().st_size + 4096  # a page behind `down.weight`, which is the last one
    data.write_bytes(data.read_bytes() + bytes(4096) + WEIGHTS["kept.weight"].tobytes())
    (entry,) = (entry for entry in tensor.external_data if entry.key == "offset")
    entry.value = str(start)
    path.write_bytes(model.SerializeToString())
    merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up"))
    after = load_graph(tmp_path / "out/m.onnx")
    assert np.array_equal(stored(after, "down.weight"), WEIGHTS["down.weight"])
    assert np.array_equal(stored(after, "kept.weight"), WEIGHTS["kept.weight"])


def test_what_an_exporter_noted_about_its_machine_is_not_published(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS)
    model = onnx.load(path)
    trace = 'File "/home/somebody/secret.py", line 1'
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value=trace)
    path.write_bytes(model.SerializeToString())
    merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up"))
    assert b"somebody" in path.read_bytes()
    assert b"somebody" not in (tmp_path / "out/m.onnx").read_bytes()


@DATA
def test_the_record_holds_hashes_of_every_file_and_the_adapters(tmp_path: Path, data: Any) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data, author="somebody")
    adapter = an_adapter(tmp_path / "ad", "up")
    merged(path, tmp_path / "out", adapter, hashing="sha256")
    properties = load_graph(tmp_path / "out/m.onnx").metadata_props
    record = json.loads(properties.pop("lora_export"))
    assert properties == {"author": "somebody"}
    there = {file.name: {"sha256": file_sha256(file)} for file in tmp_path.iterdir() if file.is_file()}
    assert record["base"] == there
    assert [entry["sha256"] for entry in record["adapters"]] == [adapter.sha256]
    assert record["settings"]["lora"] == "merged"


def test_the_next_merge_remembers_the_first_and_refuses_it(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS)
    first, second = an_adapter(tmp_path / "first", "up"), an_adapter(tmp_path / "second", "down", lora_alpha=4)
    merged(path, tmp_path / "one", first)
    merged(tmp_path / "one/m.onnx", tmp_path / "two", second)
    for adapter in (first, second):
        with pytest.raises(InputRefused, match=f"already contains the adapter {adapter.name}"):
            merged(tmp_path / "two/m.onnx", tmp_path / f"three {adapter.name}", adapter)


def test_a_tensor_that_two_layers_share_is_given_to_each(tmp_path: Path) -> None:
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
        merged(tmp_path / folder / "m.onnx", tmp_path / folder / "out", adapter)
        after = load_graph(tmp_path / folder / "out/m.onnx")
        assert np.array_equal(stored(after, "a.fc.weight"), square)
        assert np.array_equal(stored(after, "z.fc.weight"), square + 1)
        assert np.array_equal(stored(after, "b.fc.weight"), square + (pair[1] @ A).T)
        record = json.loads(after.metadata_props["lora_export"])
        assert record["base"]["m.onnx"]["xxh3_128"] == file_hash(tmp_path / folder / "m.onnx", "xxh3_128")


def test_weights_whose_order_in_the_file_is_another_are_found(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS)
    model = onnx.load(path)
    turned = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
    skeleton, inner = onnx.ModelProto(), onnx.GraphProto()
    skeleton.CopyFrom(model)
    skeleton.ClearField("graph")
    inner.CopyFrom(model.graph)
    inner.ClearField("initializer")
    inner.ClearField("node")
    # Initializers before the nodes that read them, and in two parts: protobuf joins what it finds.
    first, second = (onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])) for tensor in turned[:2])
    rest = onnx.ModelProto(graph=onnx.GraphProto(initializer=turned[2:], node=model.graph.node))
    inner_model = onnx.ModelProto(graph=inner)
    path.write_bytes(b"".join(part.SerializeToString() for part in (first, skeleton, second, inner_model, rest)))
    merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up"))
    after = load_graph(tmp_path / "out/m.onnx")
    assert np.array_equal(stored(after, "up.weight"), WEIGHTS["up.weight"] + (B @ A).T)
    assert np.array_equal(stored(after, "kept.weight"), WEIGHTS["kept.weight"])
    assert np.array_equal(stored(after, "down.weight"), WEIGHTS["down.weight"])
    record = json.loads(after.metadata_props["lora_export"])
    assert record["base"]["m.onnx"]["xxh3_128"] == file_hash(path, "xxh3_128")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_sum_is_rounded_once_to_the_graphs_own_type(tmp_path: Path, dtype: Any) -> None:
    rows = {name: (weight * 30).astype(dtype) for name, weight in WEIGHTS.items()}
    path = graph_file(tmp_path / "m.onnx", rows)
    merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up"))
    expected = (rows["up.weight"].astype(np.float64) + (B @ A).T).astype(dtype)
    assert stored(load_graph(tmp_path / "out/m.onnx"), "up.weight").tobytes() == expected.tobytes()


@DATA
def test_a_whole_tensor_takes_the_weights_place(tmp_path: Path, data: Any) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data)
    whole = np.float32(RNG.normal(size=(40, 30)))
    adapter = formats.load(peft_adapter(tmp_path / "ad", {"up": (A, B)}, {"down.weight": whole}))
    report = merged(path, tmp_path / "out", adapter)
    assert np.array_equal(stored(load_graph(tmp_path / "out/m.onnx"), "down.weight"), whole)
    assert (report.replaced, [there.weight for there in report.results]) == (1, ["up.weight"])


# --- several weights side by side in one matrix, named by a base's content ---

Q, K, V = (RNG.integers(-9, 10, (size, 40)).astype(np.float32) for size in (30, 20, 24))  # (out, in)
PARTS = {"q_proj": Q, "k_proj": K, "v_proj": V}


def packed(place: Path, data: str = "") -> tuple[Path, Path]:
    """A graph that has lost its names and packed q, k and v, and the checkpoint that it was made from."""
    place.mkdir()
    other = RNG.integers(-9, 10, (40, 50)).astype(np.float32)
    graph = graph_file(place / "m.onnx", {"packed_1": np.concatenate([Q, K, V]).T, "val_2": other}, data=data)
    tensors = {f"attn.{name}.weight": part for name, part in PARTS.items()} | {"other.weight": other.T}
    return graph, base_file(place / "base.safetensors", tensors)


@pytest.mark.parametrize("data", ["", "all.data"], ids=["inside", "beside"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_block_of_a_packed_matrix_changes_and_its_neighbours_keep_their_bytes(
    tmp_path: Path, data: str, use_dora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, base = packed(tmp_path / "place", data)
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


def test_a_graph_that_was_made_from_another_base_is_not_guessed_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, base = packed(tmp_path / "place")
    tensors = load_file(base)
    tensors["attn.q_proj.weight"][3, 3] += 1
    save_file(tensors, base)
    adapter = peft_adapter(tmp_path / "ad", {"attn.q_proj": (A, RNG.integers(-3, 4, (30, 2)))})
    line = ["merge", str(graph), str(adapter), "-o", str(tmp_path / "out.onnx")]
    assert cli.run([*line, "--base", str(base)]) == 3
    assert "attn.q_proj" in capsys.readouterr().err
    assert cli.run(line) == 3  # nor without a base
    assert cli.run(["merge", str(base), str(adapter), "-o", str(tmp_path / "o"), "--base", str(base)]) == 2
    assert not (tmp_path / "out.onnx").exists()


def test_a_quantised_weight_is_refused_with_the_ways_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = RNG.normal(size=(64, 32)).astype(np.float32)
    float_graph = graph_file(tmp_path / "f.onnx", {"fc.weight": weight})
    proto = ir.to_proto(quantised(ir.from_proto(onnx.load(float_graph))))
    onnx.save(proto, tmp_path / "q.onnx")
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": weight.T})
    adapter = peft_adapter(tmp_path / "ad", {"fc": (RNG.normal(size=(2, 64)), RNG.normal(size=(32, 2)))})
    before = folder_contents(tmp_path)
    line = ["merge", str(tmp_path / "q.onnx"), str(adapter), "-o", str(tmp_path / "m.onnx"), "--base", str(base)]
    assert cli.run(line) == 3
    assert "fc.weight is quantised (4 bits in blocks of 32)" in capsys.readouterr().err
    assert folder_contents(tmp_path) == before


@pytest.mark.parametrize("key", ["lora_export.inputs", "lora_export.rows"])
def test_a_graph_that_takes_adapters_while_it_runs_keeps_its_weights(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, **{key: "{}"})
    peft_adapter(tmp_path / "ad", {"up": (A, B)})
    assert cli.run(["merge", str(path), str(tmp_path / "ad"), "-o", str(tmp_path / "out.onnx"), "--dry-run"]) == 3
    assert "m.onnx takes adapters as inputs" in capsys.readouterr().err


# --- real exports ---


@pytest.mark.parametrize("inline", [0, 1 << 30], ids=["beside", "inside"])
@pytest.mark.parametrize("name", ["encoder", "bert"])
def test_a_merged_export_is_the_folded_one_and_computes_what_pytorch_computes(
    name: str, inline: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", inline)
    monkeypatch.setattr(block_copy, "BLOCK", 1 << 21)  # products in blocks may be rounded otherwise
    made = exported(name)
    adapter, changes = random_adapter(made.graph)
    save_graph(made.graph, tmp_path, "m.onnx")
    expected = folded(tmp_path / "m.onnx", adapter)
    merged(tmp_path / "m.onnx", tmp_path / "out", adapter)
    after = load_graph(tmp_path / "out/m.onnx")
    assert contents(after) == contents(expected)
    reference = with_changes(made.module, changes)
    feeds = inputs(name, 3, 12, seed=2)
    answer = run(after, **{key: value.numpy() for key, value in feeds.items()})
    for key, value in eager(reference, feeds).items():
        np.testing.assert_allclose(answer[key], value, rtol=1e-4, atol=1e-5)


# --- refusals: nothing is left, see the last one ---


def a_nan(weights: dict[str, NDArray[Any]]) -> None:
    weights["up.weight"][3, 4] = np.nan


def too_large(weights: dict[str, NDArray[Any]]) -> None:
    for name in weights:
        weights[name] = np.full_like(weights[name], 65504, dtype=np.float16)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [(a_nan, r"up.weight: the base holds 1 values that are not finite"), (too_large, r"up.weight: .* exceed 65504")],
)
def test_values_that_would_not_be_finite_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, NDArray[Any]]], None], problem: str
) -> None:
    weights = {name: weight.copy() for name, weight in WEIGHTS.items()}
    spoil(weights)
    path = graph_file(tmp_path / "m.onnx", weights)
    with pytest.raises(InputRefused, match=problem):
        merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up", lora_alpha=200))


def test_a_change_that_rounding_takes_is_refused(tmp_path: Path) -> None:
    weights = {name: np.full(weight.shape, 1000, np.float16) for name, weight in WEIGHTS.items()}
    path = graph_file(tmp_path / "m.onnx", weights)
    with pytest.raises(InputRefused, match=r"1 of 1 weights would lose most .*(?s:.)*up.weight: 0.0% of the change"):
        merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up", lora_alpha=0.01))


@DATA
def test_a_file_that_changes_meanwhile_is_refused(
    tmp_path: Path, data: str | Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data=data)
    touched = path if not data else tmp_path / (data if isinstance(data, str) else data["kept.weight"])
    add = sums.add_into

    def meanwhile(*arrays: Any) -> None:
        touched.touch()
        add(*arrays)

    monkeypatch.setattr(sums, "add_into", meanwhile)
    with pytest.raises(InputRefused, match=f"{touched.name} changed while it was being merged"):
        merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up"))


def test_a_graph_that_would_be_too_long_for_one_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS)
    monkeypatch.setattr("lora_export.graph.merge.file_parts.MAX_MESSAGE_BYTES", path.stat().st_size - 100)
    with pytest.raises(Exception, match="save the base graph with its weights in a file beside it"):
        merged(path, tmp_path / "out", an_adapter(tmp_path / "ad", "up"))


# --- the command ---


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    graph_file(tmp_path / "base.onnx", WEIGHTS, data="base.data")
    peft_adapter(tmp_path / "ad", {"up": (A, B)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_merges_a_graph_and_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["merge", "base.onnx", "ad", "-o", "m.onnx", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["output"], [there["weight"] for there in document["results"]]) == ("m.onnx", ["up.weight"])
    assert np.array_equal(stored(load_graph(place / "m.onnx"), "up.weight"), WEIGHTS["up.weight"] + (B @ A).T)
    assert document["bytes"] == sum(path.stat().st_size for path in place.glob("m.onnx*"))


def test_a_second_merge_removes_the_weights_of_the_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["merge", "base.onnx", "ad", "-o", "m.onnx"]) == 0
    (old,) = place.glob("m.onnx.*.data")
    assert cli.run(["merge", "base.onnx", "ad", "-o", "m.onnx", "--overwrite", "--weight", "2"]) == 0
    (new,) = place.glob("m.onnx.*.data")
    assert new != old and f"removed {old.name}" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = folder_contents(place)
    assert cli.run(["merge", "base.onnx", "ad", "-o", "m.onnx", "--dry-run"]) == 0
    assert "up.weight" in capsys.readouterr().out
    assert folder_contents(place) == before


def onto_itself(place: Path) -> list[str]:
    return ["merge", "base.onnx", "ad", "-o", "base.onnx", "--overwrite"]


def another_type(place: Path) -> list[str]:
    return ["merge", "base.onnx", "ad", "-o", "m.onnx", "--dtype", "float16"]


def a_misfit(place: Path) -> list[str]:
    peft_adapter(place / "other", {"up": (A, B[:-1]), "nowhere": (A, B)})
    return ["merge", "base.onnx", "other", "-o", "m.onnx"]


def nothing_there(place: Path) -> list[str]:
    return ["merge", "none.onnx", "ad", "-o", "m.onnx"]


def no_graph(place: Path) -> list[str]:
    (place / "text.onnx").write_text("no graph at all")
    return ["merge", "text.onnx", "ad", "-o", "m.onnx"]


def lost(place: Path) -> list[str]:
    graph_file(place / "half.onnx", {name: np.full((40, 30), 1000, np.float16) for name in WEIGHTS})
    return ["merge", "half.onnx", "ad", "-o", "m.onnx", "--weight", "0.01"]


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (onto_itself, 7, r"base.onnx"),
        (another_type, 2, r"--dtype is for checkpoints"),
        (a_misfit, 3, r"2 of 2 targets do not fit the base. Nothing was written(?s:.)*nowhere"),
        (nothing_there, 3, r"none.onnx"),
        (no_graph, 3, r"text.onnx is no ONNX file"),
        (lost, 3, r"would lose most of their change"),
    ],
)
def test_what_cannot_be_merged_is_told_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], line: Callable[[Path], list[str]], code: int, told: str
) -> None:
    arguments = line(place)
    before = folder_contents(place)
    assert cli.run(arguments) == code
    assert re.search(told, capsys.readouterr().err)
    assert folder_contents(place) == before


def test_neither_pytorch_nor_onnxruntime_is_needed(place: Path) -> None:
    program = (
        "import sys; from lora_export import cli; code = cli.run(sys.argv[1:]);"
        "sys.exit(code or sum(name in sys.modules for name in ('torch', 'onnxruntime', 'transformers')))"
    )
    line = [sys.executable, "-c", program, "merge", "base.onnx", "ad", "-o", "m.onnx"]
    assert subprocess.run(line, cwd=place, capture_output=True, check=False).returncode == 0
