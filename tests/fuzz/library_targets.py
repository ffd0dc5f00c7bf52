"""Fuzz targets of files that libraries read for the program: tokenizers, templates, images, sounds, rows, residuals.

As in `targets`, a target raises where the program did anything but succeed or refuse.
"""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import transformers as hf
from PIL import Image

from fuzz import targets
from fuzz.targets import (
    ADAPTER_CONFIG,
    GOOD_BASE,
    Target,
    a_base,
    a_place,
    an_adapter,
    as_json,
    command,
    refused,
    write,
)
from lora_export.api.generation_prompts import token_ids
from lora_export.api.generation_settings import GenerationSettings
from lora_export.models.processors import (
    features_of,
    open_extractor,
    open_tokenizer,
    pixels_of,
    read_image,
    read_sound,
    render_chat,
    tokenised,
)
from support.folder_contents import folder_contents
from support.small_models import words_tokenizer

RATE = 640  # samples a second
SETTINGS = {"eos_token_id": [2], "pad_token_id": 0, "vocab_size": 9, "suppress_tokens": [1], "num_beams": 1}
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "hidden_size": 3, "rope_scaling": None,
}  # fmt: skip
TURNS = [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "bad"}]
TEMPLATE = b"{% for m in messages %}{{ m['role'] | trim }}: {{ m.content }}{% if loop.last %}\n{% endif %}{% endfor %}"


@functools.cache
def tokenizer_files() -> dict[str, bytes]:
    with a_place() as place:
        return folder_contents(words_tokenizer(place))


def beside(name: str, files: Callable[[], dict[str, bytes]], read: Callable[[Path], object]) -> Target:
    """A file of a folder, read with the others."""

    def target(data: bytes) -> bool:
        with a_place() as place:
            write(place / "model", {**files(), name: data})
            accepted = not refused(lambda: read(place / "model"))
            assert set(folder_contents(place)) == {f"model/{each}" for each in {*files(), name}}
            return accepted

    return target


def texts(folder: Path) -> None:
    """Tokenise as `train` and `generate` do."""
    tokenizer = open_tokenizer(folder, needed=True)
    tokenised(tokenizer, "good film", truncation=True, max_length=8)
    token_ids("good \u00e9 film", tokenizer, GenerationSettings(folder), chat=False)


def chat_template(data: bytes) -> bool:
    """The chat template of a tokenizer."""
    with a_place() as place:
        write(place / "model", {**tokenizer_files(), "chat_template.jinja": data})
        return not refused(lambda: chat_of(place / "model"))


def chat_of(folder: Path) -> None:
    render_chat(open_tokenizer(folder, needed=True), TURNS, tokenize=False, add_generation_prompt=True)


def generation_config(folder: Path) -> None:
    settings = GenerationSettings(folder)
    _ = settings.rules, settings.end_tokens, settings.padding, settings.not_done, settings.languages
    np.array([settings.padding, settings.vocabulary or 0, *settings.end_tokens], np.int64)
    settings.speech_start()
    settings.first_tokens([1])


def images(folder: Path) -> None:
    Image.new("RGB", (5, 4)).save(picture := io.BytesIO(), "PNG")
    pixels_of_bytes(folder, picture.getvalue())


def pixels_of_bytes(folder: Path, data: bytes) -> None:
    with a_place() as place:
        (place / "a.png").write_bytes(data)
        pixels_of([place / "a.png"], folder)


def features(folder: Path) -> None:
    features_of([np.zeros(RATE, np.float32)], open_extractor(folder))


@functools.cache
def saved(kind: str) -> bytes:
    """What transformers writes for an image processor, or for an extractor of sounds."""
    with a_place() as place:
        if kind == "images":
            hf.ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(place)
        else:
            hf.WhisperFeatureExtractor(
                feature_size=8, sampling_rate=RATE, hop_length=16, chunk_length=1, n_fft=64
            ).save_pretrained(place)
        return (place / "preprocessor_config.json").read_bytes()


def of_one_file(name: str, read: Callable[[Path], object]) -> Target:
    def target(data: bytes) -> bool:
        with a_place() as place:
            (place / name).write_bytes(data)
            return not refused(lambda: read(place / name))

    return target


def a_picture(kind: str) -> bytes:
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).save(file := io.BytesIO(), kind)
    return file.getvalue()


def a_sound(kind: str) -> bytes:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 300)
    if kind == "WAV":
        with wave.open(file := io.BytesIO(), "wb") as sound:
            sound.setnchannels(2)
            sound.setsampwidth(2)
            sound.setframerate(RATE)
            sound.writeframes((noise * 2**15).astype("<i2").tobytes())
        return file.getvalue()
    soundfile.write(file := io.BytesIO(), noise, 8000, format=kind)
    return file.getvalue()


def some_rows() -> bytes:
    pq.write_table(pa.table({"text": ["a", "b", "b"], "label": ["x", "y", "x"]}), file := io.BytesIO())
    return file.getvalue()


def gguf_config(data: bytes) -> bool:
    """The config of the base of an adapter that is converted to GGUF."""
    with a_place() as place:
        name = "model.layers.0.mlp.down_proj"
        a_base(place, config=data, weights=targets.save({f"{name}.weight": np.ones((3, 3), np.float32)}))
        config = {**ADAPTER_CONFIG, "modules_to_save": None, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
        sides = {"A": targets.A, "B": np.ones((3, 1), np.float32)}
        pair = {f"{targets.WRAPPER}{name}.lora_{side}.weight": array for side, array in sides.items()}
        an_adapter(place, as_json(config), targets.save(pair))
        out = place / "a.gguf"
        code = command("convert", place / "adapter", "-o", out, "--to", "gguf", "--base", place / "base")
        assert out.exists() is (code == 0)
        return code == 0


@functools.cache
def merged_with_residual() -> dict[str, bytes]:
    with a_place() as place:
        a_base(place, weights=targets.save(targets.BASE_TENSORS, {"format": "pt"}))
        an_adapter(place)
        made = ("-o", place / "out", "--keep-residual", place / "residual")
        assert command("merge", place / "base", place / "adapter", *made) == 0
        return folder_contents(place)


def residual(data: bytes) -> bool:
    """The residual of a merge, with which it is undone."""
    with a_place() as place:
        for name, content in merged_with_residual().items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(content)
        (place / "residual").write_bytes(data)
        before = folder_contents(place)
        back = ("-o", place / "again", "--base-from", place / "residual")
        code = command("unmerge", place / "out", place / "adapter", *back)
        assert (place / "again").exists() is (code == 0)
        shutil.rmtree(place / "again", ignore_errors=True)
        assert folder_contents(place) == before
        return code == 0


def project_table(data: bytes) -> bool:
    """The pyproject.toml of the current folder."""
    with a_place() as place, contextlib.chdir(place):
        (place / "pyproject.toml").write_bytes(data)
        (place / "m.safetensors").write_bytes(GOOD_BASE)
        code = command("inspect", place / "m.safetensors", usage=True)
        assert set(folder_contents(place)) == {"pyproject.toml", "m.safetensors"}
        return code == 0


TARGETS: dict[str, Target] = {
    "tokenizer": beside("tokenizer.json", tokenizer_files, texts),
    "tokenizer_config": beside("tokenizer_config.json", tokenizer_files, texts),
    "chat_template": chat_template,
    "generation_config": beside("generation_config.json", dict, generation_config),
    "image_processor": beside("preprocessor_config.json", dict, images),
    "extractor": beside("preprocessor_config.json", dict, features),
    "image_png": of_one_file("a.png", read_image),
    "image_gif": of_one_file("a.gif", read_image),
    "image_tiff": of_one_file("a.tiff", read_image),
    "sound_wav": of_one_file("a.wav", lambda path: read_sound(path, RATE)),
    "sound_flac": of_one_file("a.flac", lambda path: read_sound(path, 8000)),
    "examples_parquet": targets.examples_reader(".parquet"),
    "gguf_config": gguf_config,
    "residual": residual,
    "project_table": project_table,
}


def good(name: str) -> bytes:
    """An input of a target that is read to its end."""
    makers: dict[str, Callable[[], bytes]] = {
        "tokenizer": lambda: tokenizer_files()["tokenizer.json"],
        "tokenizer_config": lambda: tokenizer_files()["tokenizer_config.json"],
        "chat_template": lambda: TEMPLATE,
        "generation_config": lambda: as_json(
            {**SETTINGS, "decoder_start_token_id": 1, "task_to_id": {"transcribe": 3}}
        ),
        "image_processor": lambda: saved("images"),
        "extractor": lambda: saved("sounds"),
        "image_png": lambda: a_picture("PNG"),
        "image_gif": lambda: a_picture("GIF"),
        "image_tiff": lambda: a_picture("TIFF"),
        "sound_wav": lambda: a_sound("WAV"),
        "sound_flac": lambda: a_sound("FLAC"),
        "examples_parquet": some_rows,
        "gguf_config": lambda: as_json(LLAMA),
        "residual": lambda: merged_with_residual()["residual"],
        "project_table": lambda: (
            b'[tool.lora-export]\nlora-rank = 4\nreport = ["a.html"]\n[tool.lora-export.inspect]\n'
        ),
    }
    return makers[name]()


GOOD = {name: good(name) for name in TARGETS}
