"""Which layers get a pair, which modules are trained whole, and ranks that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

import lora_export as le
from lora_export.errors import InputRefused
from support.api import MODEL, Recorder
from support.small_models import MODELS, small_model, words_tokenizer


def test_unknown_layers_are_refused_and_nothing_is_left(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="dens"):
        le.train(MODEL, data, tmp_path / "ad", target="dens")
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


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


def test_a_rank_beyond_a_layer_is_refused(data: Path, tmp_path: Path) -> None:
    for target in ("dense", "all-linear"):
        with pytest.raises(InputRefused, match=r"larger than 1 of 1 layers.*\n  `dense` is 8 × 8, its rank 9"):
            le.train(MODEL, data, tmp_path / "ad", rank=9, target=target)
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_of_all_linear_layers_some_may_be_smaller_than_the_rank(tmp_path: Path) -> None:
    (tmp_path / "small_head.py").write_text(
        "import torch\n\ndef make():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 2)), torch.ones(2, 8)\n"
    )
    inputs = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", input=inputs, labels=(inputs[:, 0] > 0).astype(np.int64))
    seen, model = Recorder(), f"{tmp_path}/small_head.py:make"
    result = le.train(model, tmp_path / "a.npz", tmp_path / "ad", rank=4, epochs=1, **seen.callbacks)
    assert set(result.adapter.pairs) == {"0", "1"}
    assert "note: the rank is larger than 1 of 2 layers, such as `1` is 2 × 6, its rank 4" in seen.messages
    with pytest.raises(InputRefused, match="larger than 1 of 1 layers"):
        le.train(model, tmp_path / "a.npz", tmp_path / "other", rank=4, epochs=1, target="1")
    with pytest.raises(InputRefused, match=r"larger than 2 of 2 layers.*\n  `0` is 6 × 8, its rank 9\n  `1` is 2 × 6"):
        le.train(model, tmp_path / "a.npz", tmp_path / "other", rank=4, epochs=1, rank_pattern={"0": 9})
    with pytest.raises(InputRefused, match=r"larger than 1 of 2 layers.*\n  `1` is 2 × 6, its rank 3"):
        le.train(model, tmp_path / "a.npz", tmp_path / "other", rank=2, epochs=1, rank_pattern={"1": 3})
