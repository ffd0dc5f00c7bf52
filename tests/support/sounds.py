"""Small speech models with their extractor and tokenizer, and sounds."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import transformers as hf

from support.small_models import small_model, words_tokenizer

RATE = 640  # samples a second
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefgh"]


def write_sound(path: Path, *, seconds: float = 0.75, seed: int = 0, rate: int = RATE) -> Path:
    """A .wav of noise, in 16 bits."""
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((noise * 2**15).astype("<i2").tobytes())
    return path


def small_whisper(folder: Path) -> Path:
    """A Whisper that hears one second, with the tokenizer of nine words."""
    words_tokenizer(small_model("whisper", folder))
    hf.WhisperFeatureExtractor(
        feature_size=8, sampling_rate=RATE, hop_length=16, chunk_length=1, n_fft=64
    ).save_pretrained(folder)
    return folder


def small_ctc(folder: Path, name: str = "wav2vec2", *, masks_padding: bool = True, reduction: str = "mean") -> Path:
    """A model that scores each tenth sample, with a tokenizer of eight letters, saved as a processor."""
    folder = small_model(name, folder)
    config = json.loads((folder / "config.json").read_text()) | {"ctc_loss_reduction": reduction, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder.parent / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(LETTERS)}))
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "word_delimiter_token": "|"}
    tokenizer = hf.Wav2Vec2CTCTokenizer(str(folder.parent / "vocab.json"), **special)
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=masks_padding)
    hf.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    return folder
