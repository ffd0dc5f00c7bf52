"""`inspect` on what lora-export writes: what it takes to use a file, and one line a kind of layer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

import lora_export as le
from lora_export import cli
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.storage import hashes
from support import FACTORIES
from support.cli import Capture, answer, call
from support.content_graphs import GEMM, OTHER, PACKED, QKV, WEIGHT, K, base_checkpoint, product_graph
from support.gguf_files import Kind, write_llama
from support.handmade import base_file, graph_file, peft_adapter

SPOTTER = f"{FACTORIES}:spotter"
LAYERS = ("encoder.layers.0.linear1", "encoder.layers.1.linear1")  # 32 x 16


def test_a_gguf_file_shows_its_types_of_blocks(tmp_path: Path, capsys: Capture) -> None:
    path = write_llama(tmp_path / "a.gguf", lambda name: Kind.Q4_K if "mlp" in name else Kind.F16)
    assert cli.run(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"12 tensors, {path.stat().st_size:,} bytes"
    assert "  model.layers.0.mlp.up_proj.weight  256 x 256 Q4_K" in lines
    assert "  model.layers.0.self_attn.k_proj.weight  128 x 256 float16" in lines
    tensors = {each["name"]: each for each in answer(capsys, "inspect", path)[1]["tensors"]}
    assert tensors["model.layers.0.mlp.up_proj.weight"]["stored_as"] == "Q4_K"
    assert "stored_as" not in tensors["lm_head.weight"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    rng = np.random.default_rng(0)
    for name in ("fr", "de"):
        pairs = {layer: (0.2 * rng.standard_normal((2, 16)), 0.2 * rng.standard_normal((32, 2))) for layer in LAYERS}
        peft_adapter(folder / name, pairs)
    for mode in ("merged", "nodes", "inputs", "rows"):
        adapters = [folder / "fr", folder / "de"] if mode == "rows" else folder / "fr"
        weights = [0.5] if mode == "merged" else []
        options = {"adapters": adapters, "weights": weights, "lora": mode, "verify": mode == "merged"}
        le.export_onnx(SPOTTER, folder / f"{mode}.onnx", **options)
    return folder


def lines(capsys: Capture, *words: str | Path) -> list[str]:
    capsys.readouterr()
    assert call("inspect", *words) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_a_graph_shows_what_it_takes_to_use_it(place: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = tmp_path / "rows.onnx"
    le.export_onnx(SPOTTER, rows, adapters=[place / "fr", place / "de"], lora="rows")
    found = le.inspect(rows)
    digests = [adapter.sha256 for adapter in found.adapters]
    assert [(adapter.name, adapter.id) for adapter in found.adapters] == [("fr", 1), ("de", 2)]
    shown = lines(capsys, rows)
    assert shown[0].startswith("rows.onnx: ONNX, opset ") and shown[0].endswith(" linear layers")
    assert shown[1] == (
        f"adapters chosen by the input adapter_ids: fr (id 1) {digests[0][:12]}…, de (id 2) {digests[1][:12]}…; "
        "id 0 is the base"
    )
    assert shown[2] == f"made from: sha256 {found.record.base['sha256'][:12]}…"
    assert shown[3].startswith("published with the verdict: same, ") and "CPUExecutionProvider" in shown[3]
    assert "input adapter_ids  int64 [batch]" in shown
    assert any(line.startswith("input signal  float32 [") and "4" in line for line in shown)
    assert "layer encoder.layers.*.linear1.weight  32 x 16 float32, 2 of them" in shown
    assert lines(capsys, rows, "-q") == shown[:1]


@pytest.mark.parametrize("mode", ["merged", "nodes", "inputs", "rows"])
def test_adapters_are_no_layers_and_the_mode_is_told(place: Path, capsys: Capture, mode: str) -> None:
    base = le.inspect(place / "merged.onnx")
    found = le.inspect(place / f"{mode}.onnx")
    assert found.mode == mode and len(found.linear) == len(base.linear) > 4
    code, document = answer(capsys, "inspect", place / f"{mode}.onnx")
    assert code == 0 and document["linear_layers"] == len(base.linear) and document["mode"] == mode
    assert document["adapters"][0]["name"] == "fr" and document["adapters"][0]["sha256"] == found.adapters[0].sha256
    assert document["adapters"][0]["weight"] == (0.5 if mode == "merged" else 1.0)
    assert document["base"] == found.record.base and document["verdict"] == found.verdict
    (signal,) = [port for port in document["inputs"] if port["name"] == "signal"]
    assert (signal["dtype"], signal["shape"][1], signal["dynamic_axes"]) == ("float32", 4, [0, 2])
    assert len(document["sites"]) >= len(base.linear) and document["outputs"]
    optional = [port["name"] for port in document["inputs"] if port["optional"]]
    assert len(optional) == (4 if mode == "inputs" else 0)
    shown = "\n".join(lines(capsys, place / f"{mode}.onnx"))
    assert "fr × 0.5" in shown if mode == "merged" else "fr" in shown
    assert "lora_A" not in shown or "and 4 optional inputs, as " in shown
    assert ("lora_A" in "\n".join(lines(capsys, place / f"{mode}.onnx", "--all"))) is (mode != "merged")


def test_adapters_and_checkpoints_have_a_line_a_kind(place: Path, tmp_path: Path, capsys: Capture) -> None:
    shown = lines(capsys, place / "fr")
    assert shown[0].startswith("fr: peft, 2 low-rank pairs, ")
    assert shown[1].startswith("  encoder.layers.*.linear1  32 x 16, rank 2, scale 1, ‖ΔW‖ ") and len(shown) == 7
    assert shown[1].endswith(", 2 of them")
    *facts, whole, own = shown[2:]
    assert facts == ["  scales: lora_alpha / r in adapter_config.json", "  r: 2", "  lora_alpha: 2"]
    assert re.fullmatch(r"  SHA-256: [0-9a-f]{64}", whole) and own.startswith("  SHA-256 of its tensors' file: ")
    assert len(lines(capsys, place / "fr", "--all")) == 9
    weights = {f"{layer}.weight": np.zeros((32, 16)) for layer in LAYERS}
    base_file(tmp_path / "base.safetensors", {**weights, "norm.weight": np.ones(16)})
    shown = lines(capsys, tmp_path / "base.safetensors")
    assert shown[1:] == ["  encoder.layers.*.linear1.weight  32 x 16 float32, 2 of them", "  norm.weight  16 float32"]
    assert len(lines(capsys, tmp_path / "base.safetensors", "--all")) == 4
    le.merge(tmp_path / "base.safetensors", place / "fr", tmp_path / "m.safetensors")
    shown = lines(capsys, tmp_path / "m.safetensors")
    assert shown[1].startswith("adapters merged into the weights: fr ") and shown[2].startswith("made from: base.saf")
    adapter = place / "fr.onnx_adapter"
    assert len(lines(capsys, adapter)) == 3 and answer(capsys, "inspect", adapter)[1]["has_hash"]
    (place / "old.onnx_adapter").write_bytes(adapter.read_bytes()[: -hashes.ENDING])
    assert lines(capsys, place / "old.onnx_adapter")[3].startswith("note: the file has no hash of its contents")
    assert not answer(capsys, "inspect", place / "old.onnx_adapter")[1]["has_hash"]


def test_a_hostile_record_is_shown_and_does_no_harm(tmp_path: Path, capsys: Capture) -> None:
    graph_file(tmp_path / "m.onnx", {"up.weight": np.eye(4, dtype=np.float32)})
    graph = onnx.load(tmp_path / "m.onnx")
    adapters = '[{"name": "\\u001b[2J\\nx", "weight": "much"}, {"weight": NaN}]'
    hostile = f'{{"adapters": {adapters}, "base": [1], "verdict": {{"outcome": NaN}}}}'
    onnx.helper.set_model_props(graph, {"lora_export": hostile})
    onnx.save(graph, tmp_path / "m.onnx")
    shown = "\n".join(lines(capsys, tmp_path / "m.onnx"))
    assert "\x1b" not in shown and "\\x1b[2J\\nx" in shown
    code, document = answer(capsys, "inspect", tmp_path / "m.onnx")
    assert code == 0 and document["verdict"]["outcome"] is None
    assert [adapter["weight"] for adapter in document["adapters"]] == [None, None]


def test_layers_without_a_name_lead_to_the_base(tmp_path: Path, capsys: Capture) -> None:
    graph_file(tmp_path / "m.onnx", {"val_3": np.eye(4, dtype=np.float32)})
    (line, *_) = lines(capsys, tmp_path / "m.onnx")
    assert line.endswith(
        "1 linear layer, 1 of them without a certain name (--base CHECKPOINT finds them, --all lists them)"
    )


# --- `lora-export inspect`: graphs, adapters and checkpoints. ---


def test_sites_and_naming_attempts_are_shown(tmp_path: Path, capsys: Capture) -> None:
    save_graph(product_graph(PACKED.T), tmp_path, "model.onnx")
    base_checkpoint(tmp_path, {**QKV, "other.weight": K})
    assert cli.run(["inspect", str(tmp_path / "model.onnx"), "--all"]) == 0
    assert "MatMul `n`: no certain name (tried its initializer `W`" in capsys.readouterr().out
    assert cli.run(["inspect", str(tmp_path / "model.onnx"), "--base", str(tmp_path / "base.safetensors"), "-v"]) == 0
    shown = capsys.readouterr().out
    assert "q.weight  2 x 2 float32\n    MatMul `n` [0:2], stored in_out, named by content, [0:2] of W" in shown
    assert "MatMul `n` [2:3]: no certain name" in shown
    assert "which equals k.weight and other.weight" in shown


def test_json_contains_sites_and_unnamed_layers(tmp_path: Path, capsys: Capture) -> None:
    save_graph(product_graph(PACKED.T), tmp_path, "model.onnx")
    base_checkpoint(tmp_path, {**QKV, "other.weight": K})
    line = ["inspect", str(tmp_path / "model.onnx"), "--base", str(tmp_path / "base.safetensors"), "--json"]
    assert cli.run(line) == 0
    document = json.loads(capsys.readouterr().out)
    assert [tensor["name"] for tensor in document["tensors"]] == ["q.weight", "v.weight"]
    assert document["sites"][0] == {
        "name": "q.weight", "how": "content", "operator": "MatMul", "node": "n", "input": 1, "initializer": "W",
        "layout": "in_out", "shape": [2, 2], "dtype": "float32", "stored_as": "float", "block": [0, 2],
        "quantised": None, "obstacle": "",
    }  # fmt: skip
    assert [site["equals"] for site in document["unnamed"]] == [["k.weight", "other.weight"]]


@pytest.mark.parametrize(
    ("tensors", "arguments", "code", "message"),
    [
        ({"a.weight": OTHER}, [], 3, "a.weight by initializer, no tensor by content"),
        ({"a.weight": WEIGHT}, ["base.safetensors"], 2, "--base names the weights of an .onnx file"),
    ],
)
def test_base_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: Capture, tensors: Any, arguments: list[str], code: int, message: str
) -> None:
    save_graph(product_graph(WEIGHT, GEMM, name="a.weight"), tmp_path, "model.onnx")
    checkpoint = base_checkpoint(tmp_path, tensors)
    path = tmp_path / (arguments[0] if arguments else "model.onnx")
    assert cli.run(["inspect", str(path), "--base", str(checkpoint.path)]) == code
    out, err = capsys.readouterr()
    assert message in err and not out


@pytest.mark.parametrize(("name", "kind"), [("model.onnx", "graph"), ("base.safetensors", "checkpoint")])
def test_statements_about_adapters_are_noted_beside_others(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    save_graph(product_graph(WEIGHT, GEMM, name="a.weight"), tmp_path, "model.onnx")
    base_checkpoint(tmp_path, {"a.weight": WEIGHT})
    monkeypatch.setenv("LORA_EXPORT_INSPECT_FORMAT", "kohya")
    for words, stated in (([], "--format is"), (["--lora-rank", "4"], "--format and --lora-rank are")):
        assert cli.run(["inspect", str(tmp_path / name), *words]) == 0
        assert f"note: {stated} about adapters, and {tmp_path / name} is a {kind}\n" in capsys.readouterr().err


# --- other files ---


def test_an_adapter_is_shown_with_rank_and_scale(tmp_path: Path, capsys: Capture) -> None:
    adapter = peft_adapter(tmp_path / "fr", {"fc": ([[1.0, 2.0]], [[1.0], [2.0], [3.0]])}, lora_alpha=3)
    assert cli.run(["inspect", str(adapter)]) == 0
    assert "fc" in capsys.readouterr().out
    code, document = answer(capsys, "inspect", adapter)
    assert (code, document["pairs"]["fc"]["scale"], document["name"]) == (0, 3.0, "fr")


def test_an_adapter_of_another_format_is_shown_with_its_facts(tmp_path: Path, capsys: Capture) -> None:
    tensors = {"lora_down": np.ones((2, 3), np.float32), "lora_up": np.ones((4, 2), np.float32)}
    named = {f"lora_unet_fc.{name}.weight": value for name, value in tensors.items()}
    path = tmp_path / "style.safetensors"
    header = {"modelspec.trigger_phrase": "ohwx\n\x1b[2K"}
    save_file({**named, "lora_unet_fc.alpha": np.array(1, np.float32)}, path, header)
    for more in ((), ("--all",)):
        assert cli.run(["inspect", str(path), *more]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("style: kohya, 1 low-rank pair, 14 parameters")
        assert "scales: alpha / rank, by the alpha of each pair; 1 where the file has none" in shown
        assert "trigger words: ohwx" in shown and "\x1b" not in shown
    code, document = answer(capsys, "inspect", path)
    assert (code, document["format"], document["bytes"]) == (0, "kohya", path.stat().st_size)
    assert document["metadata"]["header"] == header
    (pair,) = document["pairs"].values()
    assert (pair["scale"], document["parameters"]) == (0.5, 14)


def test_a_checkpoint_is_shown_with_shapes_and_unknown_layouts(tmp_path: Path, capsys: Capture) -> None:
    path = base_file(tmp_path / "base.safetensors", {"square.weight": np.ones((4, 4)), "bias": np.ones(4)})
    size = f"{path.stat().st_size:,}"
    assert cli.run(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"2 tensors, {size} bytes",
        "  bias  4 float32",
        "  square.weight  4 x 4 float32",
        "the layout of 1 square matrices is unknown: a merge needs --layout, or an adapter that records it",
    ]
    code, document = answer(capsys, "inspect", path)
    assert (code, {spec["name"]: spec["shape"] for spec in document["tensors"]}) == (
        0, {"bias": [4], "square.weight": [4, 4]},
    )  # fmt: skip


def test_a_tied_tensor_is_shown_with_its_other_names(tmp_path: Path, capsys: Capture) -> None:
    path = base_file(tmp_path / "base.safetensors", {"emb": np.ones((2, 3))}, metadata={"head": "emb"})
    assert cli.run(["inspect", str(path)]) == 0
    assert "  emb  2 x 3 float32, also head" in capsys.readouterr().out.splitlines()


def test_options_for_another_kind_of_file_end_with_2(tmp_path: Path, capsys: Capture) -> None:
    adapter = peft_adapter(tmp_path / "fr", {"fc": ([[1.0, 2.0]], [[1.0], [2.0]])})
    assert cli.run(["inspect", str(adapter), "--base", "x"]) == 2
    assert cli.run(["inspect", str(adapter), "--check"]) in (2, 3)
    assert "Error: " in capsys.readouterr().err
