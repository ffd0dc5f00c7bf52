"""Sounds: .wav files of every width, and the features of transformers' extractor."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import transformers as hf

from lora_export.errors import InputRefused
from lora_export.models.sounds import features_of, open_extractor, read_wav, wav_header

RATE = 16000


def a_wav(path: Path, *, width: int = 2, channels: int = 1, rate: int = RATE) -> np.ndarray:
    """Write a wave that every channel has, at its own loudness; return the mean of the channels."""
    wave_of_one = np.sin(np.arange(400) / 5)
    channel = np.stack([wave_of_one * (number + 1) / channels for number in range(channels)], axis=1) * 0.9
    middle = 2 ** (8 * width - 1)
    stored = np.round(channel * (middle - 1)).astype(np.int64)
    data = (stored + 128).astype("u1") if width == 1 else stored.astype(f"<i{width}")
    with wave.open(str(path), "wb") as file:
        file.setsampwidth(width)
        file.setnchannels(channels)
        file.setframerate(rate)
        file.writeframes(data.tobytes())
    return channel.mean(axis=1)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_is_read(tmp_path: Path, width: int, channels: int) -> None:
    right = a_wav(tmp_path / "a.wav", width=width, channels=channels)
    found = read_wav(tmp_path / "a.wav", RATE)
    assert found.dtype == np.float32
    assert found.shape == (400,)
    np.testing.assert_allclose(found, right, rtol=0, atol=1.5 / 2 ** (8 * width - 1) + 1e-7)


def test_wav_at_another_rate_is_refused(tmp_path: Path) -> None:
    a_wav(tmp_path / "a.wav", rate=44100)
    with pytest.raises(InputRefused, match=r"has 44100 samples a second, and the model takes 16000. ffmpeg -i .* -ar"):
        read_wav(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize("content", [b"", b"ID3\x04 this is an mp3", b"RIFF\x24\x00\x00\x00WAVEfmt "])
def test_file_that_is_no_wav_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(InputRefused, match=r"is no \.wav of integers .* makes one"):
        read_wav(tmp_path / "a.wav", RATE)


def test_a_header_is_read_alone_from_a_file_or_bytes(tmp_path: Path) -> None:
    a_wav(tmp_path / "a.wav", channels=2, rate=8000)
    content = (tmp_path / "a.wav").read_bytes()
    header = wav_header(tmp_path / "a.wav")
    assert (header.samples, header.rate, header.channels, header.width, header.seconds) == (400, 8000, 2, 2, 0.05)
    assert wav_header(content).name == "the sound" and wav_header(content[:50]).samples == 400
    np.testing.assert_array_equal(read_wav(content, 8000), read_wav(tmp_path / "a.wav", 8000))
    with pytest.raises(InputRefused, match=r"the sound is no \.wav of integers"):
        wav_header(b"RIFF")


def test_wav_of_24_bits_is_refused(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setsampwidth(3)
        file.setnchannels(1)
        file.setframerate(RATE)
        file.writeframes(bytes(300))
    with pytest.raises(InputRefused, match="has 24 bits for each sample; 8, 16 and 32 can be read"):
        read_wav(tmp_path / "a.wav", RATE)


def test_features_are_those_of_the_extractor(tmp_path: Path) -> None:
    own = hf.Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=RATE, do_normalize=True)
    own.save_pretrained(tmp_path)
    sound = a_wav(tmp_path / "a.wav").astype(np.float32)
    found = features_of([sound, sound[:400] * 2], open_extractor(tmp_path))
    assert found["input_values"].shape == (2, 400)
    np.testing.assert_allclose(
        found["input_values"][0], (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7), atol=1e-5
    )


def test_whisper_has_the_length_that_it_needs(tmp_path: Path) -> None:
    own = hf.WhisperFeatureExtractor(feature_size=8, sampling_rate=640, hop_length=16, chunk_length=1, n_fft=64)
    own.save_pretrained(tmp_path)
    found = features_of([np.ones(100, np.float32), np.ones(50, np.float32)], open_extractor(tmp_path))
    assert found["input_features"].shape == (2, 8, 40)


def test_folder_without_extractor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"has no preprocessor_config\.json") as refused:
        open_extractor(tmp_path)
    assert "lora_export.generate takes arrays" in str(refused.value)
    (tmp_path / "preprocessor_config.json").write_text('{"feature_extractor_type": "NoSuchExtractor"}')
    with pytest.raises(InputRefused, match=r"preprocessor_config\.json cannot be read"):
        open_extractor(tmp_path)
