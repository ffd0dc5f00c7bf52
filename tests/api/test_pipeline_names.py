"""Adapters of diffusion models under other names: kohya's with dots, ComfyUI's of the models' authors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_export import formats
from lora_export.api.pipeline_names import named_for_pipeline
from lora_export.errors import InputRefused, MatchError
from support.diffusion import adapter_file, clip_text_model, folder_of, random_pairs, transformer, unet

LAYERS = {"mid_block.attentions.0.proj_in": (64, 64, 1, 1), "up_blocks.0.resnets.1.conv1": (64, 96, 3, 3)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    folder_of(unet(), folder / "unet")
    folder_of(clip_text_model(), folder / "text_encoder")
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def kohya(folder: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]]):
    return formats.load(adapter_file(folder / "a.safetensors", pairs, prefix="lora_", flattened=True, alpha=1))


def test_flattened_names_get_their_dots_in_each_model(pipeline, tmp_path):
    pairs = random_pairs(
        {
            **{f"unet.{name}": shape for name, shape in LAYERS.items()},
            "te.text_model.encoder.layers.0.mlp.fc1": (37, 32),
        }
    )
    named = named_for_pipeline(kohya(tmp_path, pairs), pipeline, original=False)
    assert set(named.pairs) == {*(f"denoiser/{name}" for name in LAYERS), "text_encoder/encoder.layers.0.mlp.fc1"}
    assert not named.flattened and named.spelled("denoiser/up_blocks.0.resnets.1.conv1").startswith(
        "lora_unet_up_blocks_0"
    )
    own = named.pairs["denoiser/mid_block.attentions.0.proj_in"]
    assert np.array_equal(own.a, pairs["unet.mid_block.attentions.0.proj_in"][0]) and own.scale == 0.5


def test_the_names_of_the_authors_are_those_of_the_original_model(pipeline, tmp_path):
    adapter = kohya(tmp_path, random_pairs({f"unet.{name}": shape for name, shape in LAYERS.items()}))
    named = named_for_pipeline(adapter, pipeline / "unet", original=True)
    assert set(named.pairs) == {"denoiser/middle_block.1.proj_in", "denoiser/output_blocks.1.0.in_layers.2"}


@pytest.mark.parametrize(
    ("family", "module", "shape", "original"),
    [
        ("Flux", "transformer_blocks.0.ff.net.2", (32, 128), "double_blocks.0.img_mlp.2"),
        ("Flux 2", "transformer_blocks.0.ff.linear_out", (32, 96), "double_blocks.0.img_mlp.2"),
        ("Stable Diffusion 3", "transformer_blocks.1.attn.to_out.0", (32, 32), "joint_blocks.1.x_block.attn.proj"),
        ("Wan", "blocks.1.attn2.add_k_proj", (24, 24), "blocks.1.cross_attn.k_img"),
        ("HunyuanVideo", "transformer_blocks.0.ff.net.2", (20, 80), "double_blocks.0.img_mlp.fc2"),
        ("Z-Image", "layers.0.attention.to_out.0", (32, 32), "layers.0.attention.out"),
        ("Qwen-Image", "transformer_blocks.0.attn.to_add_out", (32, 32), "transformer_blocks.0.attn.to_add_out"),
    ],
)  # fmt: skip
def test_each_family_has_the_names_of_its_own_authors(family, module, shape, original, tmp_path):
    base = folder_of(transformer(family), tmp_path / "base")
    path = adapter_file(tmp_path / "a.safetensors", random_pairs({module: shape}), prefix="transformer.")
    assert list(named_for_pipeline(formats.load(path), base, original=True).pairs) == [f"denoiser/{original}"]


def test_a_part_of_a_fused_weight_is_refused_by_name(tmp_path):
    base = folder_of(transformer("Flux"), tmp_path / "base")
    pairs = random_pairs({"transformer_blocks.0.attn.to_q": (32, 32), "norm_out.linear": (64, 32)})
    path = adapter_file(tmp_path / "a.safetensors", pairs, prefix="transformer.")
    with pytest.raises(
        InputRefused, match=r"transformer_blocks\.0\.attn\.to_q: a part of a weight of the original model"
    ):
        named_for_pipeline(formats.load(path), base, original=True)


def test_a_base_that_does_not_fit_is_refused(pipeline, tmp_path):
    adapter = kohya(tmp_path, random_pairs({"unet.no": (4, 4)}))
    with pytest.raises(MatchError, match="lora_unet_no"):
        named_for_pipeline(adapter, pipeline, original=False)
    both = kohya(tmp_path, random_pairs({"unet.no": (4, 4), "te.no": (4, 4)}))
    with pytest.raises(InputRefused, match="is one model, and the adapter changes several\\. Give the folder of the"):
        named_for_pipeline(both, pipeline / "unet", original=False)
