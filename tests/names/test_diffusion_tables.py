"""The names of diffusion models: diffusers' own conversion of original checkpoints is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from lora_export.names.diffusion_layouts import OtherLayout, other_layouts
from lora_export.names.diffusion_tables import TABLES
from support.diffusion import BUILDERS, Arrays, transformer

CONVERTERS = {
    "Flux 2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "Stable Diffusion 3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "Wan": "convert_wan_transformer_to_diffusers",
    "HunyuanVideo": "convert_hunyuan_video_transformer_to_diffusers",
    "Z-Image": "convert_z_image_transformer_checkpoint_to_diffusers",
}
# diffusers expects the width 3072 where it splits this weight: the test below does it by hand.
OF_WIDTH_3072 = "single_blocks.0.linear1"
BY_HAND = ("Flux", "HunyuanVideo")
OTHER_NAMES = {"pos_embed.pos_embed": "pos_embed"}  # of a buffer that no adapter changes


def layout_of(model: str) -> OtherLayout:
    names = transformer(model).state_dict()
    return next(layout for layout in other_layouts(names) if layout.model == model)


def original_shapes(layout: OtherLayout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        name: shapes[tensor.stored]
        if tensor.conversion is None
        else tensor.conversion.assembled(shapes.__getitem__)[name].shape
        for name, tensor in layout.tensors.items()
    }


def placed(layout: OtherLayout, original: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The tensors of diffusers, filled from those of the original model by the layout."""
    arrays = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    for name, tensor in layout.tensors.items():
        if tensor.conversion is None:
            arrays[tensor.stored] = original[name]
            continue
        for piece in tensor.conversion.assembled(shapes.__getitem__)[name].pieces:
            arrays[piece.source][np.ix_(*piece.indices)] = original[name][np.ix_(*piece.positions)]
    return arrays


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Tensors in which no two entries are equal."""
    start, arrays = 0, {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        arrays[name] = np.arange(start, start + count, dtype=np.float32).reshape(shape)
        start += count
    return arrays


@pytest.mark.parametrize("model", CONVERTERS)
def test_every_tensor_has_the_place_that_diffusers_gives_it(model):
    from diffusers.loaders import single_file_utils

    layout = layout_of(model)
    shapes = {name: tuple(value.shape) for name, value in transformer(model).state_dict().items()}
    original = numbered(original_shapes(layout, shapes))
    convert: Callable[..., dict[str, torch.Tensor]] = getattr(single_file_utils, CONVERTERS[model])
    given = {
        OTHER_NAMES.get(name, name): torch.from_numpy(value)
        for name, value in original.items()
        if model != "HunyuanVideo" or not name.startswith(OF_WIDTH_3072)
    }
    converted = convert(given)
    ours = placed(layout, original, shapes)
    compared = set(converted) & set(ours)
    matrices = {name for name in ours if name.endswith(".weight") and ours[name].ndim > 1}
    by_hand = {name for name in matrices if model == "HunyuanVideo" and name.startswith("single_transformer_blocks")}
    assert matrices - by_hand <= compared
    assert {name for name in compared if not np.array_equal(ours[name], converted[name].numpy())} == set()


@pytest.mark.parametrize("model", BY_HAND)
def test_fused_weights_are_split_by_the_width_of_the_model(model):
    layout = layout_of(model)
    state = transformer(model).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    original = original_shapes(layout, shapes)
    width = shapes["single_transformer_blocks.0.attn.to_q.weight"][0]
    assert original["single_blocks.0.linear1.weight"] == (3 * width + 4 * width, width)
    ours = placed(layout, numbered(original), shapes)
    assert not any(np.isnan(value).any() for name, value in ours.items() if value.ndim > 1)
    fused = numbered(original)["single_blocks.0.linear1.weight"]
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    split = [ours[f"single_transformer_blocks.0.{part}.weight"] for part in parts]
    assert np.array_equal(np.concatenate(split), fused)
    swapped = numbered(original)["final_layer.adaLN_modulation.1.weight"]
    assert np.array_equal(ours["norm_out.linear.weight"], np.concatenate(np.split(swapped, 2)[::-1]))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.model)
def test_every_row_has_the_same_numbers_on_both_sides(table):
    for row in table.rows:
        assert len({name.count("{}") for name in (row.original, *row.parts)}) == 1
    assert len({row.original for row in table.rows}) == len(table.rows)


def test_each_family_has_a_model_in_these_tests():
    assert {table.model for table in TABLES} - {"OpenCLIP"} == set(BUILDERS) - {"Qwen-Image"}
