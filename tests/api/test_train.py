"""`lora_export.train`: an adapter as a value and as a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

import lora_export as le
from lora_export.errors import InputRefused, WrongUsage
from support.api import MODEL, Recorder, base_weights
from support.small_models import MODELS, small_model, words_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((24, 5, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", rows=rows, weights=np.ones((24, 5), np.float32), labels=np.tanh(rows[..., ::-1]))
    return tmp_path / "data.npz"


def test_training_returns_the_adapter_it_saved(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = Recorder()
    result = le.train(
        MODEL, data, tmp_path / "ad", rank=2, alpha=4.0, epochs=4, batch_size=8, learning_rate=1e-2, **seen.callbacks
    )
    assert list(result.adapter.pairs) == ["dense"] and result.adapter.pairs["dense"].scale == 2.0
    assert result.adapter.sha256 == le.load_adapter(tmp_path / "ad").sha256
    assert result.history.losses[-1] < result.history.losses[0]
    assert result.scores["adapter"].loss < result.scores["adapter_off"].loss
    assert seen.events[-1].unit == "steps" and seen.events[-1].done == seen.events[-1].total
    assert "loss" in seen.events[-1].detail
    assert capsys.readouterr() == ("", "")


def test_a_head_alone_needs_a_head(data: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="--compare-frozen needs a head"):
        le.train(MODEL, data, tmp_path / "ad", compare_frozen=True)
    assert not (tmp_path / "ad").exists()


def test_unknown_layers_are_refused_and_nothing_is_left(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="dens"):
        le.train(MODEL, data, tmp_path / "ad", target="dens")
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_the_adapter_records_layouts_so_that_a_merge_needs_no_option(data: Path, tmp_path: Path) -> None:
    trained = le.train(MODEL, data, tmp_path / "ad", rank=2, epochs=1).adapter
    assert trained.layouts == {"dense": "out_in"}
    base = base_weights(tmp_path / "base.safetensors")
    made = le.merge(base, tmp_path / "ad", tmp_path / "out.safetensors")
    assert [(step.spec.layout, step.spec.layout_source) for step in made.plan.steps] == [("out_in", "adapter")]
    assert le.verify(tmp_path / "out.safetensors", base=base, adapters=[tmp_path / "ad"])


@pytest.mark.parametrize(
    ("name", "saved"), [("distilbert", {"classifier", "pre_classifier"}), ("bert", {"classifier", "bert.pooler.dense"})]
)
def test_peft_reads_every_module_that_the_base_lacked(name: str, saved: set[str], tmp_path: Path) -> None:
    base = small_model(name, tmp_path / "base")
    if name == "bert":  # a model of masked words has no pooler, which a classifier needs
        torch.manual_seed(0)
        transformers.BertForMaskedLM(MODELS["bert"][1]()).save_pretrained(base)
    words_tokenizer(base)
    lines = [{"text": f"very {word} film", "label": word} for word in ("good", "bad") * 10]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    le.train(base, tmp_path / "data.jsonl", tmp_path / "ad", epochs=2, learning_rate=1e-2)
    assert set(json.loads((tmp_path / "ad/adapter_config.json").read_text())["modules_to_save"]) == saved
    le.merge(base, tmp_path / "ad", tmp_path / "merged")
    auto = transformers.AutoModelForSequenceClassification
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(base, num_labels=2), tmp_path / "ad").eval()
    ids = torch.arange(24).reshape(3, 8) % 9
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, theirs(ids).logits, atol=1e-6)
