"""One step of an encoder-decoder: its logits are the model's, after the first tokens and with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import lora_export as le
from lora_export.runtime.generation.encoder_decoder import EncoderDecoder
from support.generators import small_encoder_decoder, sounds


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    small_encoder_decoder("whisper", folder / "base")
    le.export_onnx(folder / "base", folder / "served", with_cache=True, verify=False)
    return folder


def logits(base: Path, tokens: np.ndarray) -> np.ndarray:
    module: Any = hf.WhisperForConditionalGeneration.from_pretrained(base).eval()
    with torch.no_grad():
        outputs = module(input_features=torch.tensor(np.stack(sounds())), decoder_input_ids=torch.tensor(tokens))
    last: np.ndarray = outputs.logits[:, -1].numpy()
    return last


def test_steps_give_the_logits_of_the_model(whisper: Path) -> None:
    model = EncoderDecoder(whisper / "served")
    assert model.takes.keys() == {"input_features"}
    assert not model.takes_mask
    assert model.rows == []
    run = model.start({"input_features": np.stack(sounds())})
    tokens = np.random.default_rng(0).integers(3, 60, (3, 6))
    done = 0
    for stop in (2, 3, 6):
        step = tokens[:, done:stop]
        right = logits(whisper / "base", tokens[:, :stop])
        found = run.step(step, np.ones_like(step), np.zeros_like(step))
        np.testing.assert_allclose(found, right, rtol=0, atol=2e-4 * np.abs(right).max())
        done = stop
    rows, one = [2, 0], np.ones((2, 1), np.int64)
    of_two = run.of_rows(rows)
    right = logits(whisper / "base", tokens[:, :1])
    found = of_two.step(tokens[rows, :1], one, one)
    np.testing.assert_allclose(found, right[rows], rtol=0, atol=2e-4 * np.abs(right).max())
    run.restart()
    again = run.step(tokens[:, :1], np.ones((3, 1), np.int64), np.zeros((3, 1), np.int64))
    np.testing.assert_allclose(again, right, rtol=0, atol=2e-4 * np.abs(right).max())
