"""Train, merge, export and verify, for every architecture that `train` takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_export.models.load import load_model
from support.cli import Capture, answer, call
from support.small_models import small_model, words_tokenizer

TEXTS = (
    *("bert", "roberta", "distilbert", "electra", "deberta", "modernbert", "llama", "qwen2", "gpt2", "opt", "t5"),
    "bart",
)
IMAGES = ("vit", "deit", "swin", "convnext", "dinov2")


def example_data(name: str, base: Path, folder: Path) -> Path:
    """Labelled texts, with a tokenizer in the base, or labelled images."""
    if name in TEXTS:
        words_tokenizer(base)
        words = ["bad", "good"]
        lines = [{"text": "very " * (row % 4) + words[row % 2] + " film", "label": words[row % 2]} for row in range(24)]
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder / "data.jsonl"
    images = load_model(str(base)).inputs({"batch": 24}, seed=1)["pixel_values"]
    np.savez(folder / "data.npz", pixel_values=images.numpy(), labels=np.arange(24) % 3)
    return folder / "data.npz"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TEXTS, *IMAGES])
def test_what_train_makes_is_merged_exported_and_proven(name: str, tmp_path: Path, capsys: Capture) -> None:
    base, adapter, merged = small_model(name, tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    data = example_data(name, base, tmp_path)
    assert call("train", base, "--data", data, "-o", adapter, "--epochs", "3", "--learning-rate", "1e-2") == 0
    warned = "the adapter will not fit the files of" in capsys.readouterr().err
    code, document = answer(capsys, "onnx", base, "-a", adapter, "-o", tmp_path / "model.onnx")
    assert (code, document["proof"]["outcome"]) == (0, "same")
    code, verdict = answer(capsys, "verify", tmp_path / "model.onnx", "--model", base, "-a", adapter)
    assert (code, verdict["outcome"]) == (0, "same")
    assert (call("merge", base, adapter, "-o", merged) == 3) == warned  # what train does not announce has to work
    if not warned:
        code, verdict = answer(capsys, "verify", merged, "--model", base, "-a", adapter)
        assert (code, verdict["outcome"]) == (0, "same")
        code, verdict = answer(capsys, "verify", merged, "--base", base, "-a", adapter)
        assert (code, verdict["outcome"]) == (0, "same")
