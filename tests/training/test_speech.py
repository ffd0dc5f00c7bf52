"""Sounds with transcripts: batches and losses beside transformers' own processors and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from lora_export.api.training_data import encoded_data, read_training_data
from lora_export.errors import InputRefused
from lora_export.models.load import load_model
from lora_export.models.processors import read_sound
from lora_export.options.train import TrainOptions
from lora_export.training.batches import module_outputs
from support.small_models import small_model, words_tokenizer
from support.sounds import RATE, small_ctc, small_whisper, write_sound

TEXTS = {"whisper": ["good film", "a very bad film", "the"], "wav2vec2": ["abba cd", "a", "hgf eed"]}
TEXTS["hubert"] = TEXTS["wav2vec2"]


def rows(folder: Path, texts: list[str], **fields: Any) -> Path:
    """A .jsonl with a sound of another length for each transcript."""
    for number in range(len(texts)):
        write_sound(folder / f"{number}.wav", seconds=0.5 + number / 5, seed=number)
    lines = [{"audio": f"{number}.wav", "text": text, **fields} for number, text in enumerate(texts)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data.jsonl"


def data_for(base: Path, path: Path, max_length: int = 16) -> Any:
    loaded = load_model(str(base), may_add=True)
    options = TrainOptions(base, path, "out", holdout=0, max_length=max_length)
    return loaded, encoded_data(loaded, read_training_data(path), options)[0]


def test_a_decoder_has_the_loss_of_transformers(tmp_path: Path) -> None:
    base = small_whisper(tmp_path / "base")
    loaded, data = data_for(base, rows(tmp_path, TEXTS["whisper"]))
    batch = data.batch([0, 1, 2])
    assert set(batch.inputs) == {"input_features", "decoder_input_ids"}
    found = data.loss.total(module_outputs(loaded.module, batch.inputs), batch) / data.loss.count(batch.labels)
    sounds = [read_sound(tmp_path / f"{number}.wav", RATE) for number in range(3)]
    features = hf.AutoFeatureExtractor.from_pretrained(base)(sounds, sampling_rate=RATE, return_tensors="pt")
    tokens = hf.AutoTokenizer.from_pretrained(base)(TEXTS["whisper"], padding=True, return_tensors="pt")
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    theirs = hf.WhisperForConditionalGeneration.from_pretrained(base).eval()
    torch.testing.assert_close(found, theirs(**features, labels=labels).loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "masks_padding", "reduction"),
    [("wav2vec2", True, "mean"), ("wav2vec2", True, "sum"), ("wav2vec2", False, "mean"), ("hubert", True, "sum")],
)
def test_frames_have_the_loss_of_transformers(name: str, masks_padding: bool, reduction: str, tmp_path: Path) -> None:
    base = small_ctc(tmp_path / "base", name, masks_padding=masks_padding, reduction=reduction)
    loaded, data = data_for(base, rows(tmp_path, TEXTS[name]))
    batch = data.batch([0, 1, 2])
    found = data.loss.total(module_outputs(loaded.module, batch.inputs), batch)
    assert data.loss.count(batch.labels) == 3 and data.loss.correct(None, batch) is None
    processor = hf.Wav2Vec2Processor.from_pretrained(base)
    sounds = [read_sound(tmp_path / f"{number}.wav", RATE) for number in range(3)]
    inputs = processor(sounds, sampling_rate=RATE, padding=True, return_tensors="pt")
    tokens = processor.tokenizer(TEXTS[name], padding=True, return_tensors="pt")
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    theirs = getattr(hf, type(loaded.module).__name__).from_pretrained(base).eval()
    expected = theirs(**inputs, labels=labels).loss * (3 if reduction == "mean" else 1)
    assert expected.isfinite() and ("attention_mask" in batch.inputs) is masks_padding
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_sound_itself_gets_no_gradient(tmp_path: Path) -> None:
    base = small_ctc(tmp_path / "base")
    loaded, data = data_for(base, rows(tmp_path, TEXTS["wav2vec2"]))
    batch = data.batch([0])
    loaded.module.requires_grad_(False).train()
    assert not module_outputs(loaded.module, batch.inputs)["loss"].requires_grad


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (small_whisper, {"seconds": 1.5}, r"line 2: the sound takes 1\.5 s, and the model hears 1 s; cut it"),
        (small_whisper, {"text": "a " * 17}, r"line 2: the transcript has 18 tokens, and 16 are allowed"),
        (small_ctc, {"seconds": 0.06, "text": "aabb"}, r"line 2: the transcript needs 6 frames, and the sound has 2"),
        (small_ctc, {"text": "abcXYZ?"}, r"line 2: the tokenizer has no token for '\?', 'X', 'Y', 'Z'"),
    ],
)
def test_rows_that_the_model_cannot_take_are_refused_before_it_trains(
    make: Any, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = make(tmp_path / "base")
    texts = list(TEXTS["whisper" if make is small_whisper else "wav2vec2"])
    texts[1] = change.pop("text", texts[1])
    path = rows(tmp_path, texts)
    if change:
        write_sound(tmp_path / "1.wav", **change)
    with pytest.raises(InputRefused, match=rf"data\.jsonl:\n  {message}"):
        data_for(base, path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    base = words_tokenizer(small_model("bert", tmp_path / "base"))
    hf.Wav2Vec2FeatureExtractor(sampling_rate=RATE).save_pretrained(base)
    path = rows(tmp_path, TEXTS["whisper"])
    with pytest.raises(InputRefused, match="is a BertModel: rows of automatic-speech-recognition need a speech model"):
        data_for(base, path)
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(InputRefused, match=r"has no preprocessor_config\.json"):
        data_for(base, path)


def test_bytes_of_a_data_set_are_read(tmp_path: Path) -> None:
    import datasets

    base = small_whisper(tmp_path / "base")
    sounds = [str(write_sound(tmp_path / f"{number}.wav", seed=number)) for number in range(2)]
    made = datasets.Dataset.from_dict({"audio": sounds, "text": ["a film", "good"]})
    made = made.cast_column("audio", datasets.Audio(decode=False))
    with_bytes = made.map(lambda row: {"audio": {"bytes": Path(row["audio"]["path"]).read_bytes(), "path": None}})
    with_bytes.cast_column("audio", datasets.Audio()).save_to_disk(str(tmp_path / "saved"))
    for path in map(Path, sounds):
        path.unlink()
    _, data = data_for(base, tmp_path / "saved")
    assert np.isfinite(data.batch([0, 1]).inputs["input_features"].numpy()).all()
