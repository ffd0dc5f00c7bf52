"""The folder of a diffusion pipeline: its models, and its other files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.weights.pipeline import is_pipeline, open_pipeline

INDEX = {
    "_class_name": "FluxPipeline",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "../outside": ["diffusers", "X"],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


def test_a_folder_with_an_index_is_a_pipeline(folder):
    assert is_pipeline(folder) and not is_pipeline(folder / "vae")
    assert list(open_pipeline(folder).models) == ["transformer", "text_encoder", "text_encoder_2", "vae"]


def test_a_component_has_the_folder_of_its_model(folder):
    pipeline = open_pipeline(folder)
    found = {component: pipeline.folder_of(component, [component]) for component in ("", "denoiser", "text_encoder")}
    assert found == {"": "transformer", "denoiser": "transformer", "text_encoder": "text_encoder"}


def test_the_third_text_encoder_of_kohya_is_the_second_of_flux(folder):
    pipeline = open_pipeline(folder)
    assert pipeline.folder_of("text_encoder_3", ["text_encoder", "text_encoder_3"]) == "text_encoder_2"
    with pytest.raises(InputRefused, match="has no text_encoder_3\\. Its models are transformer"):
        pipeline.folder_of("text_encoder_3", ["text_encoder_2", "text_encoder_3"])


def test_a_model_that_is_not_there_is_refused(folder):
    with pytest.raises(InputRefused, match="has no transformer_2\\. Its models are transformer, text_encoder"):
        open_pipeline(folder).folder_of("denoiser_2", [])


def test_other_files_are_those_of_unchanged_models(folder):
    (folder / ".cache").write_text("")
    (folder / "lora_export.json").write_text("{}")
    (folder / "vae" / "model.bin").write_bytes(b"weights")
    (folder / "vae" / "lora_export.json").write_text("{}")  # what is merged in this model
    files = {path.as_posix() for path in open_pipeline(folder).other_files({"transformer", "text_encoder_2"})}
    assert files == {
        "model_index.json",
        "text_encoder/config.json",
        *(f"vae/{name}" for name in ("config.json", "lora_export.json", "model.bin")),
    }


def test_a_link_out_of_the_pipeline_is_refused(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("home") / "secret"
    secret.write_text("x")
    (folder / "vae" / "link").symlink_to(secret)
    with pytest.raises(InputRefused, match=r"is a link to .*secret, outside the model"):
        list(open_pipeline(folder).other_files(()))


@pytest.mark.parametrize("index", ["{", "{}", '{"unet": ["diffusers", "X"]}'])
def test_a_damaged_index_is_refused(index, tmp_path: Path):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(InputRefused, match="model_index"):
        open_pipeline(tmp_path)


def test_a_link_to_a_folder_is_refused(folder):
    (folder / "safety_checker").symlink_to(folder / "vae")
    with pytest.raises(InputRefused, match="safety_checker is a link to a folder"):
        list(open_pipeline(folder).other_files(()))
