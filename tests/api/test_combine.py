"""`lora_export.combine` and `merge` with a combination: results, records, and what is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_export as le
from lora_export.errors import InputRefused, WrongUsage
from lora_export.storage.json_files import read_json
from support.api import Recorder
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


@pytest.mark.parametrize(
    ("combination", "error", "message"),
    [
        ("ties", WrongUsage, "needs density="),
        ("mean", WrongUsage, "it must be cat, linear"),
        ("linear", InputRefused, "ranks"),
    ],
)
def test_a_refusal_leaves_nothing(place: Path, combination: str, error: type[Exception], message: str) -> None:
    peft_adapter(place / "two", {"fc": (np.eye(3)[:2], np.ones((4, 2)))})
    before = sorted(place.iterdir())
    with pytest.raises(error, match=message):
        le.combine([place / "one", place / "two"], place / "both", combination=combination)
    with pytest.raises(error, match=message):
        merged(place, "one", "two", combination=combination)
    assert sorted(place.iterdir()) == before


def test_an_output_within_an_adapter_is_refused(place: Path) -> None:
    with pytest.raises(le.errors.OutputFailed):
        le.combine([place / "one", place / "two"], place / "one", overwrite=True)
    assert load_file(place / "one/adapter_model.safetensors")
