"""The family of a pipeline, by its class, its model's config, or the names in an adapter."""

from __future__ import annotations

import pytest

from lora_export.plan.diffusion.families import (
    Family,
    by_role,
    family_of_model,
    family_of_names,
    family_of_pipeline,
)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("StableDiffusionPipeline", Family.SD),
        ("StableDiffusionImg2ImgPipeline", Family.SD),
        ("StableDiffusionXLInpaintPipeline", Family.XL),
        ("StableDiffusion3Pipeline", Family.SD_3),
        ("FluxFillPipeline", Family.FLUX),
        ("Flux2Pipeline", Family.OTHER_TRANSFORMER),
        ("WanPipeline", Family.UNKNOWN),
        ("", Family.UNKNOWN),
    ],
)
def test_the_class_of_a_pipeline(name, family):
    assert family_of_pipeline(name) is family


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time"}, Family.XL),
        ({"_class_name": "UNet2DConditionModel", "addition_embed_type": None}, Family.SD),
        ({"_class_name": "SD3Transformer2DModel"}, Family.SD_3),
        ({"_class_name": "FluxTransformer2DModel"}, Family.FLUX),
        ({"_class_name": "WanTransformer3DModel"}, Family.OTHER_TRANSFORMER),
        ({"model_type": "clip_text_model"}, Family.UNKNOWN),
    ],
)
def test_the_config_of_a_model(config, family):
    assert family_of_model(config) is family


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["denoiser/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"], Family.SD),
        (["denoiser/down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"], Family.XL),
        (["input_blocks.1.1.proj_in", "text_encoder_2/a"], Family.XL),
        (["denoiser/single_blocks_0_linear1"], Family.FLUX),
        (["denoiser/single_transformer_blocks.0.proj_mlp"], Family.FLUX),
        (["denoiser/joint_blocks.0.x_block.attn.qkv"], Family.SD_3),
        (["denoiser/transformer_blocks.0.attn.to_q"], Family.OTHER_TRANSFORMER),
        (["text_encoder_2/a", "text_encoder_3/a"], Family.SD_3),
        (["text_encoder/a", "text_encoder_2/a"], Family.XL),
        (["text_encoder/a"], Family.UNKNOWN),
    ],
)
def test_the_names_in_an_adapter(names, family):
    assert family_of_names(names) is family


def test_t5_is_the_third_text_encoder():
    assert by_role("text_encoder_2/encoder.block.0.layer.0.SelfAttention.q") == (
        "text_encoder_3/encoder.block.0.layer.0.SelfAttention.q"
    )
    for name in ("text_encoder_2/text_model.encoder.layers.0.mlp.fc1", "text_encoder/encoder.block.0.layer.0.q", "a"):
        assert by_role(name) == name
