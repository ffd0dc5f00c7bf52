"""The MODEL grammar, and inputs made for it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.models import load
from lora_export.models.load import load_model
from support import FACTORIES

HERE = FACTORIES.parent


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_a_file_factory_gives_its_module_in_eval_mode() -> None:
    loaded = load_model(f"{FACTORIES}:spotter")
    assert type(loaded.module).__name__ == "Spotter"
    assert not loaded.module.training
    assert loaded.input_names == ("signal",)


def test_a_package_factory_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    assert load_model("factories:scaled").input_names == ("rows", "weights")


def test_a_package_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    (tmp_path / "a_net_of_mine.py").write_text(
        f"import sys; sys.path.append({str(HERE)!r}); from factories import scaled"
    )
    with pytest.raises(InputRefused, match="cannot import a_net_of_mine"):
        load_model("a_net_of_mine:scaled")
    monkeypatch.chdir(tmp_path)
    assert load_model("a_net_of_mine:scaled").input_names == ("rows", "weights")


def test_axes_that_the_model_lets_vary_are_found_by_trying() -> None:
    # The 4 channels belong to the convolution; the length does not.
    assert load_model(f"{FACTORIES}:spotter").axes == {"signal": {0: "batch", 2: "signal_axis2"}}


def test_axes_of_one_size_vary_together() -> None:
    assert load_model(f"{FACTORIES}:scaled").axes == {
        "rows": {0: "batch", 1: "rows_axis1"},
        "weights": {0: "batch", 1: "rows_axis1"},
    }


def test_inputs_have_the_sizes_that_were_asked_for_and_are_repeatable() -> None:
    loaded = load_model(f"{FACTORIES}:scaled")
    first, again, other = (loaded.inputs({"batch": 3, "rows_axis1": 7}, seed=seed) for seed in (1, 1, 2))
    assert first["rows"].shape == (3, 7, 8)
    assert first["weights"].shape == (3, 7)
    assert torch.equal(first["rows"], again["rows"])
    assert not torch.equal(first["rows"], other["rows"])


def test_checked_sizes_differ_from_the_traced_ones_and_hold_a_single_row() -> None:
    loaded = load_model(f"{FACTORIES}:scaled")
    sets = loaded.checked_sizes({})
    assert len(sets) == 3
    assert 1 in {sizes["batch"] for sizes in sets}
    for symbol, traced in loaded.traced_sizes.items():
        assert traced not in {sizes[symbol] for sizes in sets}


def test_fixed_sizes_stay_as_they_are() -> None:
    loaded = load_model(f"{FACTORIES}:scaled")
    assert {sizes["rows_axis1"] for sizes in loaded.checked_sizes({"rows_axis1": 5})} == {5}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "is no model"),
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("no_such_package_at_all:make", "cannot import no_such_package_at_all"),
        (f"{FACTORIES}:missing", "has no function missing; it has .*spotter"),
        (f"{FACTORIES}:without_examples", "without example inputs"),
        (f"{FACTORIES}:single_row", "at least 2"),
        (f"{FACTORIES}:no_module", "returned str"),
        (f"{FACTORIES}:failing", r"factories\.py:\d+: ValueError: no weights at hand"),
        (f"{FACTORIES}:wrong_examples", r"do not fit forward\(signal\)"),
        (f"{FACTORIES}:fixed_batch", "fails at another batch size, 3"),
    ],
)
def test_what_is_no_model_is_refused_with_what_is_wrong(source: str, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        load_model(source)


def test_a_file_that_does_not_parse_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make(:\n")
    with pytest.raises(InputRefused, match=r"broken\.py.*SyntaxError"):
        load_model(f"{tmp_path / 'broken.py'}:make")


def test_a_huggingface_folder_gives_ids_in_range_and_masks_with_padding(tiny_bert: Path) -> None:
    loaded = load_model(str(tiny_bert))
    for seed in range(5):
        made = loaded.inputs({"batch": 4, "sequence": 13}, seed=seed)
        assert (made["attention_mask"].sum(1) >= 1).all()
        assert (made["attention_mask"][1::2, -1] == 0).all()
    assert list(made) == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(value.shape == (4, 13) for value in made.values())
    assert made["input_ids"].min() >= 0
    assert made["input_ids"].max() < 50
    with torch.no_grad():
        assert loaded.module(**made).last_hidden_state.shape == (4, 13, 16)


def test_labels_bring_a_head_of_their_number(tiny_bert: Path) -> None:
    loaded = load_model(str(tiny_bert), labels=["cat", "dog", "eel"])
    assert type(loaded.module).__name__ == "BertForSequenceClassification"
    assert loaded.module.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert loaded.module.classifier.out_features == 3


@pytest.mark.fault(26)
def test_code_that_came_with_a_model_is_not_run(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in tiny_bert.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputRefused, match="auto_map"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.fault(25)
def test_a_pickle_beside_a_models_weights_is_not_opened(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "bert")
    for name in ("pytorch_model.bin", "training_args.bin"):
        (tmp_path / "bert" / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    one, other = load_model(str(tiny_bert)), load_model(str(tmp_path / "bert"))
    assert one.fingerprint() == other.fingerprint()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"), [({"model_type": "no-such-model"}, "does not know"), ({"architectures": ["Nope"]}, "Nope")]
)
def test_an_unknown_architecture_is_refused_by_name(
    tiny_bert: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    for path in tiny_bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputRefused, match=message):
        load_model(str(tmp_path))


def test_weights_of_a_file_replace_the_modules_own_all_of_them_or_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    loaded = load_model(f"{FACTORIES}:scaled")
    weights = {name: tensor + 1 for name, tensor in loaded.module.state_dict().items()}
    save_file(weights, tmp_path / "whole.safetensors")
    changed = load.module_with_weights(loaded, tmp_path / "whole.safetensors")
    assert torch.equal(changed.dense.weight, loaded.module.dense.weight + 1)
    del weights["dense.bias"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(InputRefused, match=r"dense\.bias"):
        load.module_with_weights(loaded, tmp_path / "part.safetensors")


def test_the_fingerprint_changes_with_a_single_weight() -> None:
    one, other = (load_model(f"{FACTORIES}:scaled") for _ in range(2))
    assert one.fingerprint() == other.fingerprint()
    with torch.no_grad():
        other.module.dense.bias[0] += 1
    assert one.fingerprint() != other.fingerprint()
