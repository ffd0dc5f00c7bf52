"""`lora-export generate`: what it prints, its exit codes, and the export that it needs."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lora_export.api import generate
from lora_export.artifacts.files import GRAPH_FILES, IMAGE_TEXT_FILES
from lora_export.cli.generate import shown_text
from support.cli import answer, call
from support.generators import FRAMES, MELS, decoder_adapter, small_decoder, small_encoder_decoder, small_tokenizer
from support.tiny_models import tiny_bert


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder `base`, its adapter `fr`, and its graph for rows in the folder `served`."""
    folder = tmp_path_factory.mktemp("served")
    base, adapter = small_decoder("llama", folder / "base"), decoder_adapter(folder / "base", folder / "fr")
    options = ("--lora", "rows", "--with-cache", "--fuse", "cpu", "--no-verify")
    assert call("onnx", base, "-a", f"fr={adapter}", "-o", folder / "served", *options) == 0
    return folder


def test_export_writes_a_folder_that_generates(place: Path) -> None:
    names = {path.name for path in (place / "served").iterdir()}
    assert names == {
        *("model.onnx", "genai_config.json", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    config = json.loads((place / "served" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "model.onnx"


def test_single_text_is_the_only_answer_on_stdout(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (document,) = answer(capsys, "generate", place / "served", "--prompt", "w5 w9", "--max-new-tokens", "6")
    assert document["prompt"] == "w5 w9"
    assert document["adapter"] is None
    assert len(document["tokens"]) == 6
    capsys.readouterr()
    assert call("generate", place / "served", "--prompt", "w5 w9", "--max-new-tokens", "6") == 0
    assert capsys.readouterr().out == document["text"] + "\n"


def test_several_prompts_are_numbered_and_may_have_adapters_of_their_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("generate", place / "served", "--prompt", "w5 w9", "--prompt", "w5 w9", "--max-new-tokens", "6")
    _, document = answer(capsys, *command, "--adapter", "fr", "--adapter", "base")
    assert [part["adapter"] for part in document] == ["fr", "base"]
    assert document[0]["tokens"] != document[1]["tokens"]
    capsys.readouterr()
    assert call(*command, "--adapter", "fr", "--adapter", "base") == 0
    texts = [part["text"] for part in document]
    assert capsys.readouterr().out == f"1. w5 w9\n{texts[0]}\n2. w5 w9\n{texts[1]}\n"


def test_unknown_adapter_and_missing_folder_exit_with_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", place / "served", "--prompt", "w1", "--adapter", "es") == 3
    assert "has no adapter es; it has fr" in capsys.readouterr().err
    assert call("generate", place / "nowhere", "--prompt", "w1") == 3
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_second_export_into_the_folder_is_refused_and_replaces_it_with_overwrite(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("onnx", place / "base", "-o", place / "served2", "--task", "text-generation", "--no-verify")
    assert call(*command) == 0
    assert call(*command) == 7
    assert "--overwrite" in capsys.readouterr().err
    (place / "served2" / "genai_config.json").write_text("{}")
    assert call(*command, "--overwrite") == 0
    assert json.loads((place / "served2" / "genai_config.json").read_text())["model"]["type"] == "decoder"


@pytest.mark.parametrize("option", [("--with-cache",), ("--task", "text-generation"), ("--fuse", "cpu")])
def test_options_of_an_export_do_not_go_with_a_graph(
    place: Path, option: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("onnx", place / "served" / "model.onnx", "-a", place / "fr", "-o", place / "x.onnx")
    assert call(*command, *option) == 2
    assert "MODEL is a graph already" in capsys.readouterr().err


def test_model_that_generates_nothing_is_refused_before_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bert(hf.BertModel).save_pretrained(tmp_path / "bert")
    assert call("onnx", tmp_path / "bert", "-o", tmp_path / "served", "--with-cache") == 3
    assert "BertModel generates no texts" in capsys.readouterr().err
    assert not (tmp_path / "served").exists()


def test_control_characters_of_a_text_do_not_reach_the_terminal() -> None:
    assert shown_text("a\tb\nc\x1b[2J\r\x07d") == "a\tb\nc\\x1b[2J\\r\\x07d"


@pytest.mark.slow
def test_speech_model_reads_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = small_encoder_decoder("whisper", tmp_path / "base")
    assert call("onnx", base, "--with-cache", "--no-verify", "-o", tmp_path / "speech") == 0
    extractor = hf.WhisperFeatureExtractor(
        feature_size=MELS, sampling_rate=640, hop_length=16, chunk_length=640 // 16 // FRAMES, n_fft=64
    )
    extractor.save_pretrained(tmp_path / "speech")
    with wave.open(str(tmp_path / "call.wav"), "wb") as file:
        file.setparams((1, 2, 640, 0, "NONE", ""))
        file.writeframes((np.sin(np.arange(600) / 3) * 9000).astype("<i2").tobytes())
    command = ("generate", tmp_path / "speech", "--audio", tmp_path / "call.wav", "--max-new-tokens", "6")
    _, (document,) = answer(capsys, *command)
    assert document["prompt"] == str(tmp_path / "call.wav")
    assert len(document["tokens"]) == 6
    capsys.readouterr()
    assert call(*command) == 0
    assert capsys.readouterr().out == f"tokens {' '.join(map(str, document['tokens']))}\n"
    assert call("generate", tmp_path / "speech", "--prompt", "w5") == 3
    assert "the model reads sounds" in capsys.readouterr().err


@pytest.mark.slow
def test_image_to_text_model_reads_image_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = small_encoder_decoder("trocr", tmp_path / "base")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(base)
    small_tokenizer().save_pretrained(base)
    drawn = np.random.default_rng(0).integers(0, 255, (2, 20, 30, 3), np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in drawn]
    options: list[object] = []
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
        options += ["--image", tmp_path / f"{number}.png"]
    assert call("onnx", base, "--with-cache", "--no-verify", "-o", tmp_path / "reads") == 0
    _, document = answer(capsys, "generate", tmp_path / "reads", *options, "--max-new-tokens", "64")
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    module: Any = hf.VisionEncoderDecoderModel.from_pretrained(base).eval()
    expected = module.generate(pixel_values=pixels, max_new_tokens=64, do_sample=False)[:, 1:].tolist()
    assert [part["tokens"] for part in document] == expected
    assert expected[0] != expected[1]
    assert call("generate", tmp_path / "reads", "--prompt", "w5") == 3
    assert "the model reads images: a prompt is the path of an image" in capsys.readouterr().err
    begun = ["--prompt", "w22 w30", "--prompt", "w9", "--max-new-tokens", "16"]  # of two lengths
    _, document = answer(capsys, "generate", tmp_path / "reads", *options, *begun)
    for row, (given, part) in enumerate(zip(([22, 30], [9]), document, strict=True)):
        made = module.generate(
            pixel_values=pixels[row : row + 1], decoder_input_ids=torch.tensor([given]), max_new_tokens=16,
            do_sample=False,
        )  # fmt: skip
        assert part["tokens"] == made[0, 1 + len(given) :].tolist() != expected[row][:16]
        assert part["prompt"] == str(tmp_path / f"{row}.png")
    for words, code, message in [
        (["--prompt", "w5"] * 3, 2, "there are 3 prompts for 2 images: give one for all, or one for each"),
        (["--prompt", "w5", "--chat"], 2, "a chat template is for prompts, not for the first tokens"),
        (["--prompt", ""], 3, "a prompt has no token"),
    ]:
        assert call("generate", tmp_path / "reads", *options, *words) == code
        assert message in capsys.readouterr().err
    for file in (tmp_path / "reads").glob("tokenizer*"):
        file.unlink()
    assert call("generate", tmp_path / "reads", *options, "--prompt", "w5") == 3
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_model_that_reads_no_images_has_no_first_tokens(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", place / "served", "--image", place / "a.png", "--prompt", "w5") == 2
    assert "(--prompt beside --image) are for models that read images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("--prompt", "w5", "--audio", "call.wav"),
        ("--image", "a", "--audio", "b"),
        ("--image", "a", "--audio", "b", "--prompt", "c"),
    ],
)
def test_either_texts_or_sounds_or_images_are_given(
    place: Path, given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", place / "served", *given) == 2
    assert "give --prompt TEXT, --audio FILE for a speech model, or --image FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "prompts", "images", "count"),
    [(IMAGE_TEXT_FILES, 1, 2, 1), (IMAGE_TEXT_FILES, 2, 1, 2), (GRAPH_FILES, 1, 2, 2), (GRAPH_FILES, 1, 1, 1)],
)
def test_a_single_text_is_shown_while_it_is_generated(
    names: tuple[str, ...],
    prompts: int,
    images: int,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in names:
        (tmp_path / name).touch()

    def made(*, on_text: Any, **_: Any) -> list[generate.Generation]:
        on_text(0, "streamed")
        return [generate.Generation("w5", (1, 2), "whole")] * count

    monkeypatch.setattr(generate, "generate", made)
    assert call("generate", tmp_path, *["--prompt", "w5"] * prompts, *["--image", "a.png"] * images) == 0
    assert capsys.readouterr().out == ("streamed\n" if count == 1 else "1. w5\nwhole\n2. w5\nwhole\n")
