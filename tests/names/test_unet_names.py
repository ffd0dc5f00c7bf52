"""The names of a UNet in its authors' code and in diffusers: diffusers' own conversion is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_export.names.diffusion_layouts import other_layouts
from lora_export.names.diffusion_tables import unet_table
from support.diffusion import unet


@pytest.mark.parametrize("like_sdxl", [False, True])
def test_every_tensor_has_the_name_that_diffusers_gives_it(like_sdxl):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = unet(like_sdxl=like_sdxl)
    state = model.state_dict()
    (layout,) = other_layouts(state)
    originals = {name: tensor.sources[0] for name, tensor in layout.tensors.items()}
    assert sorted(originals.values()) == sorted(state)
    checkpoint = {f"model.diffusion_model.{name}": state[source] for name, source in originals.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(model.config))
    assert set(converted) == set(state)
    assert {name for name, value in converted.items() if not torch.equal(value, state[name])} == set()


@pytest.mark.parametrize("like_sdxl", [False, True])
def test_the_names_of_the_original_lead_back_to_those_of_diffusers(like_sdxl):
    state = unet(like_sdxl=like_sdxl).state_dict()
    (layout,) = other_layouts(state)
    shapes = {name: tuple(state[tensor.sources[0]].shape) for name, tensor in layout.tensors.items()}
    (back,) = other_layouts(f"model.diffusion_model.{name}" for name in layout.tensors)
    assert layout.is_original and not back.is_original
    assert set(back.tensors) == set(state)
    for name, tensor in back.tensors.items():
        (source,) = tensor.sources
        original = source.removeprefix("model.diffusion_model.")
        assert layout.tensors[original].sources == [name]
        if tensor.conversion is not None:
            whole = tensor.conversion.assembled(lambda stored: shapes[stored.removeprefix("model.diffusion_model.")])
            assert whole[name].shape == tuple(state[name].shape)
            assert all(np.array_equal(one, np.arange(len(one))) for one in whole[name].pieces[0].indices)


def test_another_model_has_no_blocks():
    assert unet_table(["model.layers.0.mlp.up_proj.weight"]) is None


def test_a_unet_of_one_resolution_has_a_table():
    table = unet_table(
        ["input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight", "output_blocks.0.0.in_layers.2.weight"]
    )
    assert table is not None
    names = {row.original: row.parts for row in table.rows}
    assert names["input_blocks.1.0.in_layers.2"] == ("down_blocks.0.resnets.0.conv1",)


@pytest.mark.parametrize(
    "names",
    [
        ["down_blocks.0.resnets.99999999999.conv1.weight"],
        ["down_blocks.99999999.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv1.weight"],
        ["down_blocks.3.resnets.0.conv1.weight"],
        ["input_blocks.0.0.op.weight", "output_blocks.0.1.proj.weight"],
        ["input_blocks.99999999999.0.in_layers.0.weight"],
    ],
)
def test_numbers_that_no_unet_has_make_no_table(names):
    assert unet_table(names) is None
