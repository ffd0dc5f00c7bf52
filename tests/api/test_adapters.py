"""`combine`, `resize` and `extract`: results, records, and what is left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import lora_export as le
from lora_export.api import adapters
from lora_export.api.adapters import ExtractResult
from lora_export.errors import InputRefused, OutputFailed, WrongUsage
from lora_export.storage.json_files import read_json
from support.api import Recorder
from support.combined import IDS, LAYERS, adapted, layers
from support.fine_tuned import RANK, base_and_tuned, inputs_of, made
from support.handmade import base_file, graph_file, peft_adapter

W = np.arange(12).reshape(4, 3)
ONE = (np.array([[1, 2, 3]]), np.array([[1], [0], [2], [4]]))
TWO = (np.array([[0, 1, 1]]), np.array([[5], [1], [0], [1]]))
LINEAR = (ONE[1] + TWO[1]) @ (ONE[0] + TWO[0])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base_file(tmp_path / "base.safetensors", {"fc.weight": W, "up.weight": W})
    peft_adapter(tmp_path / "one", {"fc": ONE})
    peft_adapter(tmp_path / "two", {"fc": TWO, "up": TWO}, task_type="CAUSAL_LM")
    return tmp_path


def merged(place: Path, *adapters: str, **options: object) -> dict[str, np.ndarray]:
    paths = [place / name for name in adapters]
    le.merge(place / "base.safetensors", paths, place / "out.safetensors", **options)  # type: ignore[arg-type]
    return load_file(place / "out.safetensors")


def test_the_exact_sum_is_one_adapter(place: Path) -> None:
    seen = Recorder()
    result = le.combine(
        [place / "one", place / "two"], place / "both", weights=[2, -1], on_message=seen.messages.append
    )
    assert (result.modules, result.shared, result.largest_rank, seen.messages) == (2, 1, 2, [])
    after = merged(place, "both")
    np.testing.assert_array_equal(after["fc.weight"], W + 2 * ONE[1] @ ONE[0] - TWO[1] @ TWO[0])
    np.testing.assert_array_equal(after["up.weight"], W - TWO[1] @ TWO[0])


def test_a_method_gives_the_same_merged_and_as_an_adapter(place: Path) -> None:
    direct = merged(place, "one", "two", combination="linear")
    np.testing.assert_array_equal(direct["fc.weight"], W + LINEAR)
    (place / "out.safetensors").unlink()
    le.combine([place / "one", place / "two"], place / "both", combination="linear")
    np.testing.assert_array_equal(merged(place, "both")["fc.weight"], direct["fc.weight"])


def test_rslora_keeps_its_change(place: Path) -> None:
    # PEFT 0.21 multiplies such a combination by the root of its rank.
    wide = (np.concatenate([ONE[0]] * 4), np.concatenate([ONE[1]] * 4, axis=1))
    for name in ("three", "four"):
        peft_adapter(place / name, {"fc": wide}, use_rslora=True, lora_alpha=2 if name == "four" else 4)
    le.combine([place / "three", place / "four"], place / "both")
    np.testing.assert_array_equal(merged(place, "both")["fc.weight"], W + (2 + 1) * 4 * ONE[1] @ ONE[0])


def test_the_record_names_every_source(place: Path) -> None:
    le.combine([place / "one", place / "two"], place / "both", combination=le.Combination("ties", 1.0))
    record = read_json(place / "both/lora_export.json")
    assert [source["name"] for source in record["sources"]] == ["one", "two"]
    assert record["settings"]["combine"] == {"method": "ties", "density": 1.0, "majority_sign": "total"}
    assert read_json(place / "both/adapter_config.json")["target_modules"] == ["fc", "up"]


def test_a_merge_records_its_combination(place: Path) -> None:
    (place / "base").mkdir()
    (place / "base.safetensors").rename(place / "base/model.safetensors")
    le.merge(place / "base", [place / "one", place / "two"], place / "out", combination="linear")
    manifest = read_json(place / "out/lora_export.json")
    assert manifest["settings"]["combine"] == {"method": "linear"}
    assert [adapter["name"] for adapter in manifest["adapters"]] == ["one", "two"]
    with pytest.raises(InputRefused, match="already contains the adapter one"):
        le.merge(place / "out", place / "one", place / "again")


def test_a_combination_is_merged_into_a_graph(tmp_path: Path) -> None:
    graph_file(tmp_path / "base.onnx", {"fc.weight": np.eye(4, dtype=np.float32)})
    square = [(np.array([[1, 2, 0, 1]]), ONE[1]), (np.array([[0, 1, 3, 1]]), TWO[1])]
    paths = [peft_adapter(tmp_path / name, {"fc": own}) for name, own in zip(("one", "two"), square, strict=True)]
    result = le.merge(tmp_path / "base.onnx", paths, tmp_path / "out.onnx", combination="linear")
    change = (square[0][1] + square[1][1]) @ (square[0][0] + square[1][0])
    assert result.report is not None and result.report.results[0].changed == np.count_nonzero(change)
    assert "linear of 1 * B A" in str(result.plan)


def test_layers_of_no_common_name_are_noted(place: Path) -> None:
    peft_adapter(place / "other", {"model.fc": TWO})
    result = le.combine([place / "one", place / "other"], place / "both")
    assert result.notes == (
        "no module is in several of the adapters: fc (one), model.fc (other). prefixes= renames, where the same layers "
        "are meant",
    )
    renamed = le.combine([place / "one", place / "other"], place / "renamed", prefixes={"model.": ""})
    assert (renamed.modules, renamed.shared, renamed.notes) == (1, 1, ())


def test_an_output_within_an_adapter_is_refused(place: Path) -> None:
    with pytest.raises(le.errors.OutputFailed):
        le.combine([place / "one", place / "two"], place / "one", overwrite=True)
    assert load_file(place / "one/adapter_model.safetensors")


# --- resize ---


def test_peft_loads_the_smaller_adapter(tmp_path: Path) -> None:
    adapted(tmp_path, {"r": 4, "use_rslora": True, "rank_pattern": {"linear": 3}, "modules_to_save": ["point"]} | {
        "target_modules": [layer for layer in LAYERS if layer != "point"]
    })  # fmt: skip
    result = le.resize(tmp_path / "one", tmp_path / "small", rank=2)
    assert [layer.rank for layer in result.layers] == [2] * 4 and 0.5 < result.share < 0.99
    net, old = layers().eval(), le.load_adapter(tmp_path / "one")
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for module, pair in old.pairs.items():
        u, s, vt = np.linalg.svd(pair.delta().reshape(pair.shape[0], -1).astype(np.float64), full_matrices=False)
        best = ((u[:, :2] * s[:2]) @ vt[:2]).reshape(pair.shape).astype(np.float32)
        state[f"{module}.weight"] += torch.from_numpy(best.T.copy() if module in ("table", "conv1d") else best)
    before = net(IDS).detach()
    net.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(layers(), tmp_path / "small").eval()
    torch.testing.assert_close(loaded(IDS).detach(), net(IDS).detach(), atol=1e-5, rtol=0)
    assert (before - net(IDS).detach()).abs().max() > 0.02
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "small")]
    key = "base_model.model.point.weight"
    np.testing.assert_array_equal(stored[0][key], stored[1][key])


def test_the_record_names_the_adapter(tmp_path: Path) -> None:
    peft_adapter(tmp_path / "big", {"fc": (np.eye(3), np.eye(3))})
    (tmp_path / "big/config.json").write_text('{"model_type": "bert"}')
    le.resize(f"fr={tmp_path / 'big'}", tmp_path / "small", energy=0.5)
    record = read_json(tmp_path / "small/lora_export.json")
    assert record["sources"][0]["name"] == "fr" and record["settings"] == {"resize": {"energy": 0.5}}
    assert (tmp_path / "small/config.json").read_text() == '{"model_type": "bert"}'
    assert le.load_adapter(tmp_path / "small").pairs["fc"].rank == 2


@pytest.mark.parametrize(
    ("options", "error"), [({}, WrongUsage), ({"rank": 0}, WrongUsage), ({"energy": 2}, WrongUsage)]
)
def test_a_refused_resize_leaves_nothing(tmp_path: Path, options: dict[str, int], error: type[Exception]) -> None:
    peft_adapter(tmp_path / "big", {"fc": (np.eye(3), np.eye(3))})
    with pytest.raises(error):
        le.resize(tmp_path / "big", tmp_path / "small", **options)  # type: ignore[arg-type]
    with pytest.raises(OutputFailed):
        le.resize(tmp_path / "big", tmp_path / "big", rank=1)
    with pytest.raises(InputRefused):
        le.resize(tmp_path / "nowhere", tmp_path / "small", rank=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big"]


# --- extract ---


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    change = np.outer([1, 2, 3], [1, 0, 2, 1])
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.zeros((3, 4)), "norm.weight": [1, 1]})
    base_file(tmp_path / "tuned.safetensors", {"fc.weight": change, "norm.weight": [1, 2]})
    return tmp_path


LAYOUT = {"*": "out_in"}


def extract(tuned: Path, **options: object) -> ExtractResult:
    chosen = {"rank": 1, "layout": LAYOUT} | options
    return le.extract(tuned / "base.safetensors", tuned / "tuned.safetensors", tuned / "adapter", **chosen)  # type: ignore[arg-type]


def test_the_result_reports_every_layer(tuned: Path) -> None:
    seen = Recorder()
    result = extract(tuned, **seen.callbacks)
    assert [(layer.module, layer.shape, layer.rank, layer.of_rank) for layer in result.layers] == [("fc", (3, 4), 1, 3)]
    assert result.share == pytest.approx(1) and result.layers[0].norm == pytest.approx(np.sqrt(14 * 6))
    assert (result.whole, result.excluded) == (("norm.weight",), ())
    assert seen.stages == ["comparing"] and seen.events[-1].done == seen.events[-1].total > 0
    loaded = le.load_adapter(tuned / "adapter")
    np.testing.assert_allclose(loaded.pairs["fc"].delta(), np.outer([1, 2, 3], [1, 0, 2, 1]), atol=1e-5)
    assert loaded.replaced["norm.weight"].tolist() == [1, 2]


def test_what_is_left_out_is_noted_and_recorded(tuned: Path) -> None:
    seen = Recorder()
    result = extract(tuned, exclude=["norm"], energy=0.9, **seen.callbacks)
    assert result.excluded == ("norm.weight",)
    assert seen.messages == ["note: left out, though other than the base's: 1 tensor (exclude=): norm.weight"]
    record = read_json(tuned / "adapter/lora_export.json")
    assert record["settings"] == {"extract": {"rank": 1, "energy": 0.9}, "excluded": ["norm.weight"]}


def test_the_config_names_the_base_and_the_task(tmp_path: Path) -> None:
    base_and_tuned("llama", tmp_path, parts=("q_proj",), noise=0.01)
    result = le.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", energy=0.8)
    config = read_json(tmp_path / "adapter/adapter_config.json")
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "base"))
    assert sorted({layer.module for layer in result.layers}) == [
        *("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    ]
    assert result.whole == ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias")


@pytest.mark.parametrize("parts", [("query",), ("query", "classifier")])
def test_peft_loads_what_is_extracted_of_a_classifier(tmp_path: Path, parts: tuple[str, ...]) -> None:
    tuned = base_and_tuned("bert-classifier", tmp_path, parts=parts)
    le.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=RANK)
    loaded = peft.PeftModel.from_pretrained(made("bert-classifier"), str(tmp_path / "adapter")).eval()
    inputs = inputs_of("bert-classifier")
    torch.testing.assert_close(loaded(**inputs).logits, tuned(**inputs).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": None}, WrongUsage, "give rank=, or energy="),
        ({"rank": 0}, WrongUsage, "at least 1"),
        ({"layout": {"*": "wide"}}, WrongUsage, r"\*=wide is not NAME=out_in or NAME=in_out"),
        ({"layout": {"up": "in_out"}}, InputRefused, "no matrix of the base has this name"),
        ({"layout": {}}, InputRefused, r"fc.weight: how it is stored is unknown"),
    ],
)
def test_a_refused_extraction_leaves_nothing(
    tuned: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    before = sorted(tuned.iterdir())
    with pytest.raises(error, match=message):
        extract(tuned, **options)
    assert sorted(tuned.iterdir()) == before


def test_a_full_disk_is_named_by_the_folder_of_the_output(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(OutputFailed, match=rf"^{tuned} has 1 bytes free"):
        extract(tuned)


def test_a_checkpoint_that_changes_meanwhile_is_refused(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = adapters.write_any_ranks

    def change_and_write(*arguments: object, **options: object) -> None:
        write(*arguments, **options)  # type: ignore[arg-type]
        base_file(tuned / "tuned.safetensors", {"fc.weight": np.ones((3, 4)), "norm.weight": [1, 2]})

    monkeypatch.setattr(adapters, "write_any_ranks", change_and_write)
    with pytest.raises(InputRefused, match="changed while it was being read"):
        extract(tuned)
    assert not (tuned / "adapter").exists()
