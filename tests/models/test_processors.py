"""Tokenizers, images and sounds of a folder: opened by transformers, or refused in one line."""

from __future__ import annotations

import builtins
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import transformers as hf
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.models.processors import (
    features_of,
    open_extractor,
    open_processor,
    open_tokenizer,
    pixels_of,
    read_image,
    read_sound,
    sound_header,
    tokenised,
)
from support.small_models import backtracking, words_tokenizer


def opened(folder: Path) -> object:
    return open_processor("AutoImageProcessor", folder, needs="images need", failure=f"{folder} has none")


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputRefused) as refused:
        opened(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path} has none: ") and "\n" not in str(refused.value)


def test_transformers_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentLacking, match=r"images need transformers \(.*\): pip install 'transformers>="):
        opened(tmp_path)


def test_the_class_of_transformers_reads_the_folder(tmp_path: Path) -> None:
    import transformers

    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert opened(tmp_path).size["height"] == 8  # type: ignore[attr-defined]


def test_tokenizer_in_the_folder_is_opened(tmp_path: Path) -> None:
    assert open_tokenizer(words_tokenizer(tmp_path), needed=True)("good film")["input_ids"] == [4, 6, 2]


def test_absent_tokenizer_is_an_error_only_where_it_is_needed(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path, needed=False) is None
    with pytest.raises(InputRefused, match=r"has no tokenizer.*\.save_pretrained\('.+'\)$"):
        open_tokenizer(tmp_path, needed=True)


def test_code_of_the_folder_does_not_run(tmp_path: Path) -> None:
    words_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    try:
        open_tokenizer(tmp_path, needed=True)
    except InputRefused as refused:
        assert "tokenizer" in str(refused)
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words_tokenizer(tmp_path)
    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.delitem(__import__("sys").modules, "transformers")
    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(EnvironmentLacking, match=r"pip install 'transformers>="):
        open_tokenizer(tmp_path, needed=True)


RED, BLUE = (255, 0, 0), (0, 0, 255)


def an_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (9, 7)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def test_pixels_are_those_of_the_processor_in_the_folder(tmp_path: Path) -> None:
    ViTImageProcessorPil(size={"height": 4, "width": 4}).save_pretrained(tmp_path)
    paths = [an_image(tmp_path / "red.png", RED), an_image(tmp_path / "blue.jpg", BLUE, (5, 5))]
    pixels = pixels_of(paths, tmp_path)
    assert pixels.shape == (2, 3, 4, 4) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, :, 0, 0], [[1, -1, -1], [-1, -1, 1]], atol=0.02)  # (x / 255 - 0.5) / 0.5


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path)
    paths = [an_image(tmp_path / "a.png", RED), an_image(tmp_path / "b.png", RED, (5, 5))]
    with pytest.raises(InputRefused, match=r"several sizes: \[3, 5, 5\] and \[3, 7, 9\]"):
        pixels_of(paths, tmp_path)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IDAT" + b"\x00" * 4)
    with pytest.raises(InputRefused, match=r"9,000 x 9,000 pixels; at most 67,108,864 are decoded"):
        read_image(tmp_path / "a.png")


def test_a_file_that_starts_another_program_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow opens an EPS, whatever its name, and runs Ghostscript on it."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: Image.new("RGB", (9, 9)).im)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.convert("RGB").size == (9, 9)
    with pytest.raises(InputRefused, match="no image that can be read"):
        read_image(tmp_path / "a.png")


def test_what_is_no_image_or_no_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputRefused, match=r"no image that can be read: cannot identify image file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(InputRefused, match=r"has no image processor \(preprocessor_config\.json\)"):
        pixels_of([an_image(tmp_path / "b.png", RED)], tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputRefused, match="has no image processor"):
        pixels_of([tmp_path / "b.png"], tmp_path)


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
    with pytest.raises(EnvironmentLacking, match=rf"sounds need {package} .* pip install 'soundfile>="):
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


def test_an_extractor_that_makes_tensors_of_pytorch_alone_is_read(tmp_path: Path) -> None:
    hf.OmniASRFeatureExtractor().save_pretrained(tmp_path)
    sounds = [a_sound(tmp_path / "a.wav").astype(np.float32), np.ones(900, np.float32)]
    found = features_of(sounds, open_extractor(tmp_path))
    assert found["input_values"].shape == (2, 1, 4000)
    np.testing.assert_array_equal(found["padding_mask"].sum(1), [4000, 900])


def test_a_sound_that_becomes_several_rows_is_refused(tmp_path: Path) -> None:
    hf.CohereAsrFeatureExtractor(max_audio_clip_s=2, overlap_chunk_second=1).save_pretrained(tmp_path)
    extractor, second = open_extractor(tmp_path), np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    assert features_of([second, second], extractor).keys() == {"input_features", "attention_mask"}
    with pytest.raises(InputRefused, match="makes 5 rows of 2 sounds: it cuts long ones"):
        features_of([second, np.tile(second, 5)], extractor)


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 3)])
def test_an_extractor_that_makes_fewer_rows_is_refused(shape: tuple[int, ...]) -> None:
    def extractor(_: object, **__: object) -> dict[str, np.ndarray]:
        return {"input_features": np.zeros((2, 3), np.float32), "lengths": np.zeros(shape, np.float32)}

    extractor.sampling_rate = 8000
    rows = shape[0] if shape else 0
    with pytest.raises(InputRefused, match=f"makes {rows} rows of 2 sounds, and not one for each$"):
        features_of([np.zeros(3, np.float32)] * 2, extractor)


def test_folder_without_extractor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"has no preprocessor_config\.json") as refused:
        open_extractor(tmp_path)
    assert "lora_export.generate takes arrays" in str(refused.value)
    (tmp_path / "preprocessor_config.json").write_text('{"feature_extractor_type": "NoSuchExtractor"}')
    with pytest.raises(InputRefused, match=r"preprocessor_config\.json cannot be read"):
        open_extractor(tmp_path)


def test_a_tokenizer_that_panics_on_a_text_is_refused(tmp_path: Path) -> None:
    """Its regular expression backtracks: the library in Rust panics, which is no Exception in Python."""
    path = backtracking(words_tokenizer(tmp_path)) / "tokenizer.json"
    assert path.is_file()
    tokenizer = open_tokenizer(tmp_path, needed=True)
    with pytest.raises(InputRefused, match="the tokenizer fails on a text: Onig: Regex search error"):
        tokenised(tokenizer, "a" * 28)
    with pytest.raises(InputRefused, match="the tokenizer fails on a text: "):
        tokenised(tokenizer, 3)


def test_ctrl_c_is_no_failure_of_a_tokenizer() -> None:
    def interrupted(*_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenised(interrupted, "a text")


@pytest.mark.parametrize("change", [{"size": {"height": -4, "width": 4}}, {"image_mean": ["a"]}, {"resample": 99}])
def test_a_processor_with_damaged_settings_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    ViTImageProcessorPil(size={"height": 4, "width": 4}).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputRefused, match=r"the image processor fails on an image|has no image processor"):
        pixels_of([an_image(tmp_path / "red.png", RED)], tmp_path)
