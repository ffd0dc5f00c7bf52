"""Sounds: files of many kinds and rates, and the features of transformers' extractor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import transformers as hf

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.models.sounds import features_of, open_extractor, read_sound, sound_header

RATE = 16000


def a_sound(path: Path, *, kind: str = "PCM_16", channels: int = 1, rate: int = RATE, seconds: float = 0.25) -> Any:
    """Write a tone of 440 Hz that every channel has, at its own loudness; return the mean of the channels."""
    tone = np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    channel = np.stack([tone * (number + 1) / channels for number in range(channels)], axis=1) * 0.8
    soundfile.write(path, channel, rate, subtype=kind)
    return channel.mean(axis=1)


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("a.wav", "PCM_U8", 2**-7),
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-23),
        ("a.wav", "FLOAT", 1e-7),
        ("a.flac", "PCM_16", 2**-15),
        ("a.ogg", "VORBIS", 0.05),
        ("a.mp3", "MPEG_LAYER_III", 0.05),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_of_many_kinds_are_read(tmp_path: Path, name: str, kind: str, error: float, channels: int) -> None:
    right = a_sound(tmp_path / name, kind=kind, channels=channels)
    found = read_sound(tmp_path / name, RATE)
    assert found.dtype == np.float32 and found.shape == right.shape
    inner = slice(400, -400)  # what compresses smears the ends
    np.testing.assert_allclose(found[inner], right[inner], rtol=0, atol=1.5 * error + 1e-7)
    np.testing.assert_array_equal(read_sound((tmp_path / name).read_bytes(), RATE), found)


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_another_rate_is_resampled(tmp_path: Path, rate: int) -> None:
    a_sound(tmp_path / "a.wav", rate=rate)
    right = a_sound(tmp_path / "b.wav", rate=RATE)
    found = read_sound(tmp_path / "a.wav", RATE)
    assert found.dtype == np.float32 and abs(len(found) - len(right)) <= 1
    inner = slice(400, 3600)
    np.testing.assert_allclose(found[inner], right[inner], rtol=0, atol=2e-3)
    header = sound_header(tmp_path / "a.wav")
    assert (header.samples, header.rate, header.channels, header.seconds) == (rate // 4, rate, 1, rate // 4 / rate)
    assert abs(header.samples_at(RATE) - len(found)) <= 1


@pytest.mark.parametrize("content", [b"", b"ID3\x04 this is an mp3", b"RIFF\x24\x00\x00\x00WAVEfmt "])
def test_what_is_no_sound_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(InputRefused, match=r"a\.wav is damaged, or no sound .* ffmpeg -i .*a\.wav sound\.flac makes"):
        read_sound(tmp_path / "a.wav", RATE)
    with pytest.raises(InputRefused, match="the sound is damaged, or no sound that libsndfile reads"):
        sound_header(content)


def test_samples_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([0, np.nan, 1.0]), RATE, subtype="FLOAT")
    with pytest.raises(InputRefused, match=r"a\.wav has samples that are not finite"):
        read_sound(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize(("package", "rate"), [("soundfile", RATE), ("soxr", 8000)])
def test_without_its_package_the_environment_is_lacking(
    package: str, rate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_sound(tmp_path / "a.wav")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentLacking, match=rf"sounds need {package} .* pip install 'lora-export\[audio\]'"):
        read_sound(tmp_path / "a.wav", rate)


def test_features_are_those_of_the_extractor(tmp_path: Path) -> None:
    own = hf.Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=RATE, do_normalize=True)
    own.save_pretrained(tmp_path)
    sound = a_sound(tmp_path / "a.wav").astype(np.float32)
    found = features_of([sound, sound * 2], open_extractor(tmp_path))
    assert found["input_values"].shape == (2, 4000)
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
