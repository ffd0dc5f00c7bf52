"""`inspect` on what lora-export writes: what it takes to use a file, and one line a kind of layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import lora_export as le
from lora_export.storage import hashes
from support import FACTORIES
from support.cli import answer, call
from support.handmade import base_file, graph_file, peft_adapter

SPOTTER = f"{FACTORIES}:spotter"
LAYERS = ("encoder.layers.0.linear1", "encoder.layers.1.linear1")  # 32 x 16


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
        options = {"adapters": adapters, "weights": weights, "lora": mode, "verify": mode == "rows"}
        le.export_onnx(SPOTTER, folder / f"{mode}.onnx", **options)
    return folder


def lines(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[str]:
    capsys.readouterr()
    assert call("inspect", *words) == 0
    return capsys.readouterr().out.splitlines()


def test_a_graph_shows_what_it_takes_to_use_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = le.inspect(place / "rows.onnx")
    digests = [adapter.sha256 for adapter in found.adapters]
    assert [(adapter.name, adapter.id) for adapter in found.adapters] == [("fr", 1), ("de", 2)]
    shown = lines(capsys, place / "rows.onnx")
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
    assert lines(capsys, place / "rows.onnx", "-q") == shown[:1]


@pytest.mark.parametrize("mode", ["merged", "nodes", "inputs", "rows"])
def test_adapters_are_no_layers_and_the_mode_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
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


def test_adapters_and_checkpoints_have_a_line_a_kind(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = lines(capsys, place / "fr")
    assert shown[0].startswith("fr: peft, 2 low-rank pairs, ")
    assert shown[1].startswith("  encoder.layers.*.linear1  32 x 16, rank 2, scale 1, ‖ΔW‖ ") and len(shown) == 5
    assert shown[1].endswith(", 2 of them")
    assert shown[2:] == ["  scales: lora_alpha / r in adapter_config.json", "  r: 2", "  lora_alpha: 2"]
    assert len(lines(capsys, place / "fr", "--all")) == 7
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


def test_a_hostile_record_is_shown_and_does_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph_file(tmp_path / "m.onnx", {"up.weight": np.eye(4, dtype=np.float32)})
    graph = onnx.load(tmp_path / "m.onnx")
    hostile = '{"adapters": [{"name": "\\u001b[2J\\nx", "weight": "much"}], "base": [1], "verdict": {"outcome": NaN}}'
    onnx.helper.set_model_props(graph, {"lora_export": hostile})
    onnx.save(graph, tmp_path / "m.onnx")
    shown = "\n".join(lines(capsys, tmp_path / "m.onnx"))
    assert "\x1b" not in shown and "\\x1b[2J\\nx" in shown
    code, document = answer(capsys, "inspect", tmp_path / "m.onnx")
    assert code == 0 and document["verdict"]["outcome"] is None and document["adapters"][0]["weight"] is None


def test_layers_without_a_name_lead_to_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph_file(tmp_path / "m.onnx", {"val_3": np.eye(4, dtype=np.float32)})
    (line, *_) = lines(capsys, tmp_path / "m.onnx")
    assert line.endswith(
        "1 linear layer, 1 of them without a certain name (--base CHECKPOINT finds them, --all lists them)"
    )
