"""`lora_export.extract`: results, records, progress, and what is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lora_export as le
from lora_export.errors import InputRefused, OutputFailed, WrongUsage
from lora_export.storage.json_files import read_json
from support.api import Recorder
from support.fine_tuned import base_and_tuned
from support.handmade import base_file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    change = np.outer([1, 2, 3], [1, 0, 2, 1])
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.zeros((3, 4)), "norm.weight": [1, 1]})
    base_file(tmp_path / "tuned.safetensors", {"fc.weight": change, "norm.weight": [1, 2]})
    return tmp_path


LAYOUT = {"*": "out_in"}


def extract(place: Path, **options: object) -> le.api.extract.ExtractResult:
    chosen = {"rank": 1, "layout": LAYOUT} | options
    return le.extract(place / "base.safetensors", place / "tuned.safetensors", place / "adapter", **chosen)  # type: ignore[arg-type]


def test_the_result_reports_every_layer(place: Path) -> None:
    seen = Recorder()
    result = extract(place, **seen.callbacks)
    assert [(layer.module, layer.shape, layer.rank, layer.of_rank) for layer in result.layers] == [("fc", (3, 4), 1, 3)]
    assert result.share == pytest.approx(1) and result.layers[0].norm == pytest.approx(np.sqrt(14 * 6))
    assert (result.whole, result.excluded) == (("norm.weight",), ())
    assert seen.stages == ["comparing"] and seen.events[-1].done == seen.events[-1].total > 0
    loaded = le.load_adapter(place / "adapter")
    np.testing.assert_allclose(loaded.pairs["fc"].delta(), np.outer([1, 2, 3], [1, 0, 2, 1]), atol=1e-5)
    assert loaded.replaced["norm.weight"].tolist() == [1, 2]


def test_what_is_left_out_is_noted_and_recorded(place: Path) -> None:
    seen = Recorder()
    result = extract(place, exclude=["norm"], energy=0.9, **seen.callbacks)
    assert result.excluded == ("norm.weight",)
    assert seen.messages == ["note: 1 tensors that differ are left out (exclude=): norm.weight"]
    record = read_json(place / "adapter/lora_export.json")
    assert record["settings"] == {"extract": {"rank": 1, "energy": 0.9}, "excluded": ["norm.weight"]}


def test_the_config_names_the_base_and_the_task(tmp_path: Path) -> None:
    base_and_tuned("llama", tmp_path, parts=("q_proj",), noise=0.01)
    result = le.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", energy=0.8)
    config = read_json(tmp_path / "adapter/adapter_config.json")
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "base"))
    assert sorted({layer.module for layer in result.layers}) == [
        *("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
    ]
    assert result.whole == ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": None}, WrongUsage, "give rank=, or energy="),
        ({"rank": 0}, WrongUsage, "at least 1"),
        ({"layout": {"*": "wide"}}, WrongUsage, "a layout is out_in or in_out"),
        ({"layout": {"up": "in_out"}}, InputRefused, "no matrix of the base has this name"),
        ({"layout": {}}, InputRefused, r"fc.weight: how it is stored is unknown"),
    ],
)
def test_a_refusal_leaves_nothing(
    place: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    before = sorted(place.iterdir())
    with pytest.raises(error, match=message):
        extract(place, **options)
    assert sorted(place.iterdir()) == before


def test_a_checkpoint_that_changes_meanwhile_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.api import extract as module

    write = module.write_any_ranks

    def change_and_write(*arguments: object, **options: object) -> None:
        write(*arguments, **options)  # type: ignore[arg-type]
        base_file(place / "tuned.safetensors", {"fc.weight": np.ones((3, 4)), "norm.weight": [1, 2]})

    monkeypatch.setattr(module, "write_any_ranks", change_and_write)
    with pytest.raises(InputRefused, match="changed while it was being read"):
        extract(place)
    assert not (place / "adapter").exists()


def test_an_existing_output_needs_overwrite(place: Path) -> None:
    extract(place)
    with pytest.raises(OutputFailed):
        extract(place)
    assert extract(place, overwrite=True).layers
