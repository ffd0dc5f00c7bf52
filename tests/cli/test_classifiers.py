"""Classifiers of texts through the command line: a head for every decoder and encoder, and labels that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from support.api import MODEL
from support.cli import answer, call
from support.small_models import MODELS, small_model, words_tokenizer


def reviews(path: Path, classes: int = 2) -> Path:
    """Short texts of different lengths, each with one of so many labels."""
    words = ["bad", "good", "film"]
    lines = [
        {"text": "very " * (number % 4) + words[number % classes] + " film", "label": words[number % classes]}
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_decoder_without_padding_id_is_trained_merged_and_proven(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = words_tokenizer(small_model(name, tmp_path / "base"))
    assert json.loads((base / "config.json").read_text()).get("pad_token_id") is None
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert call("train", base, "--data", reviews(tmp_path / "reviews.jsonl"), "-o", adapter, "--epochs", "2") == 0
    assert call("merge", base, adapter, "-o", merged) == 0
    for folder in (adapter, merged):
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 0
    code, verdict = answer(capsys, "verify", merged, "--model", base, "-a", adapter)
    assert (code, verdict["outcome"]) == (0, "same")
    code, document = answer(capsys, "onnx", base, "-a", adapter, "-o", tmp_path / "model.onnx")
    assert (code, document["proof"]["outcome"]) == (0, "same")


def test_a_tokenizer_without_padding_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = words_tokenizer(small_model("llama", tmp_path / "base"), pad=None)
    data = reviews(tmp_path / "reviews.jsonl")
    code, document = answer(capsys, "train", base, "--data", data, "-o", tmp_path / "adapter")
    assert code == 3 and document["error"].startswith("the tokenizer has no padding token")
    assert "tokenizer.pad_token = tokenizer.eos_token" in document["error"] and "\n" not in document["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "reviews.jsonl"]


def test_a_padding_token_without_a_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = small_model("llama", tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(words_tokenizer(tmp_path / "tokenizer"))
    tokenizer.add_tokens([f"word{number}" for number in range(60)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    code, document = answer(
        capsys, "train", base, "--data", reviews(tmp_path / "reviews.jsonl"), "-o", tmp_path / "adapter"
    )
    assert code == 3 and "padding token has the id 69, and the model has rows for 60 tokens" in document["error"]


@pytest.fixture
def three_labels(tmp_path: Path) -> Path:
    """A classifier of three labels."""
    torch.manual_seed(0)
    config = MODELS["bert"][1]()
    config.num_labels = 3
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    return words_tokenizer(tmp_path / "base")


def test_another_number_of_labels_is_refused_with_both(
    three_labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = reviews(tmp_path / "reviews.jsonl", 2)
    code, document = answer(capsys, "train", three_labels, "--data", data, "-o", tmp_path / "adapter")
    assert code == 3
    assert "has a classifier of 3 labels, and the data has 2 (bad, good)" in document["error"]
    assert "save_pretrained(FOLDER)" in document["error"]
    data = reviews(tmp_path / "reviews.jsonl", 3)
    assert call("train", three_labels, "--data", data, "-o", tmp_path / "adapter", "--epochs", "1") == 0


def test_a_head_of_another_number_of_labels_is_refused_by_name(
    three_labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MODELS["bert"][1]()
    model = transformers.BertForSequenceClassification(config)
    options = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    code, document = answer(capsys, "onnx", three_labels, "-a", tmp_path / "adapter", "-o", tmp_path / "out.onnx")
    assert code == 3
    assert "classifier.weight is (3, 16) in the folder, and (2, 16) by the config" in document["error"]


def test_examples_that_the_model_cannot_take_are_the_models_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.ones((24, 5, 7), np.float32)  # its layer takes 8 numbers
    np.savez(tmp_path / "a.npz", rows=rows, weights=np.ones((24, 5), np.float32), labels=np.ones((24, 5, 8)))
    code, document = answer(capsys, "train", MODEL, "--data", tmp_path / "a.npz", "-o", tmp_path / "adapter")
    assert code == 8 and "itself fails on the examples (rows, weights)" in document["error"]
    assert not (tmp_path / "adapter").exists()


def test_texts_are_cut_where_the_models_positions_end(three_labels: Path, tmp_path: Path) -> None:
    lines = [{"text": "good " * 100, "label": label} for label in "abc" * 8]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call("train", three_labels, "--data", tmp_path / "long.jsonl", "-o", tmp_path / "adapter") == 0
