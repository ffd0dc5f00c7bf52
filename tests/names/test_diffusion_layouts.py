"""A base under the names of its other layout: diffusers' own conversion of original checkpoints is the oracle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from lora_export.names.diffusion_layouts import TABLES, OtherLayout, other_layouts, unet_table
from lora_export.names.tensor_parts import NotExpressible
from support.diffusion import CONVERTERS, Arrays, converted_by_diffusers, layout_of, original_shapes, transformer, unet

QKV = "double_blocks.0.img_attn.qkv"
FLUX = {
    f"model.diffusion_model.{QKV}.weight": (12, 4),
    f"model.diffusion_model.{QKV}.bias": (12,),
    "model.diffusion_model.single_blocks.0.linear1.weight": (28, 4),
    "model.diffusion_model.single_blocks.0.linear1.bias": (28,),
    "model.diffusion_model.final_layer.adaLN_modulation.1.weight": (8, 4),
    "model.diffusion_model.norm.scale": (4,),
    "first_stage_model.x.weight": (4, 4),
}


def flux(names=FLUX):
    return next(layout for layout in other_layouts(names) if layout.model == "Flux")


def test_the_names_after_a_prefix_are_those_of_diffusers():
    layout = flux()
    assert not layout.is_original
    parts = [
        f"transformer_blocks.0.attn.{part}.{kind}" for part in ("to_q", "to_k", "to_v") for kind in ("weight", "bias")
    ]
    assert {*parts, "norm.scale", "norm_out.linear.weight"} < set(layout.tensors)
    assert layout.tensors["norm.scale"].stored == "model.diffusion_model.norm.scale"
    assert not any("first_stage" in name for name in layout.tensors)


def test_a_bias_is_split_as_its_weight_is():
    tensors = flux().tensors
    for kind, axes in (("weight", 2), ("bias", 1)):
        name = f"single_transformer_blocks.0.proj_mlp.{kind}"
        conversion = tensors[name].conversion
        assert conversion is not None
        part = conversion.assembled(FLUX.__getitem__)[name]
        assert part.shape == (16, 4)[:axes]
        assert part.pieces[0].indices[0].tolist() == list(range(12, 28))


def test_the_halves_of_a_modulation_are_swapped():
    conversion = flux().tensors["norm_out.linear.weight"].conversion
    assert conversion is not None and not conversion.stacks
    (piece,) = conversion.assembled(FLUX.__getitem__)["norm_out.linear.weight"].pieces
    assert dict(zip(piece.positions[0].tolist(), piece.indices[0].tolist(), strict=True))[0] == 4


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("transformer_blocks.0.attn.to_q.weight", (10, 4), "splits 10 rows into 3 equal parts"),
        ("single_transformer_blocks.0.attn.to_q.weight", (12, 4), "splits 12 rows into square matrices and a rest"),
        ("norm_out.linear.weight", (7, 4), "swaps the halves of 7 rows"),
    ],
)
def test_sizes_that_do_not_fit_are_not_expressible(name, shape, message):
    conversion = flux().tensors[name].conversion
    assert conversion is not None
    with pytest.raises(NotExpressible, match=message):
        conversion.assembled(lambda _: shape)


def test_a_fused_weight_needs_all_of_its_parts():
    names = [f"transformer_blocks.0.attn.{part}.weight" for part in ("to_q", "to_k")]
    assert not any(
        f"{QKV}.weight" in layout.tensors for layout in other_layouts([*names, "transformer_blocks.0.ff.net.2.weight"])
    )


def test_a_language_model_has_no_other_layout():
    assert other_layouts(["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]) == []


def test_the_packed_attention_of_openclip_is_three_projections():
    prefix = "conditioner.embedders.1.model.transformer.resblocks.0"
    names = [f"{prefix}.attn.in_proj_weight", f"{prefix}.attn.in_proj_bias", f"{prefix}.attn.out_proj.weight"]
    (layout,) = other_layouts(names)
    own = "text_model.encoder.layers.0.self_attn"
    assert {f"{own}.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")} < set(layout.tensors)
    assert layout.tensors[f"{own}.k_proj.weight"].sources == [names[0]]


@pytest.mark.parametrize("own", ["text_projection", "text_projection.weight"])
def test_the_projection_of_openclip_is_a_transposed_parameter(own):
    block = "text_model.encoder.layers.0.mlp.fc1" if own.endswith("weight") else "transformer.resblocks.0.mlp.c_fc"
    (layout,) = other_layouts([f"{block}.weight", own])
    (name,) = {"text_projection", "text_projection.weight"} - {own}
    conversion = layout.tensors[name].conversion
    assert conversion is not None and own not in layout.tensors
    (piece,) = conversion.assembled({own: (3, 5)}.__getitem__)[name].pieces
    assert (piece.source, piece.axes, [len(each) for each in piece.indices]) == (own, (1, 0), [5, 3])


# diffusers has the widths of the published models in its code where it splits these: ending -> (out, in) there
WIDE = {"single_blocks.0.linear1": (21504, 3072), "attention.qkv": (3840, 2304)}
OF_ONE_WIDTH = ("Flux", "Chroma", "HunyuanVideo", "Lumina 2")
OTHER_NAMES = {"pos_embed.pos_embed": "pos_embed"}  # of a buffer that no adapter changes


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
    layout = layout_of(model)
    shapes = {name: tuple(value.shape) for name, value in transformer(model).state_dict().items()}
    original = numbered(original_shapes(layout, shapes))
    of_width = original if model in OF_ONE_WIDTH else {}
    wide = {name: shape for name in of_width for ending, shape in WIDE.items() if ending in name}
    rows = {name: torch.arange(out).reshape(-1, *[1] * (original[name].ndim - 1)) for name, (out, _) in wide.items()}
    given = {OTHER_NAMES.get(name, name): torch.from_numpy(value) for name, value in original.items()}
    converted = converted_by_diffusers(model, given | rows)
    ours = placed(layout, original, shapes)
    of_wide = {part for name in wide for part in layout.tensors[name].sources}
    matrices = {name for name in ours if name.endswith(".weight") and ours[name].ndim > 1}
    assert matrices <= converted.keys()
    moved = {part for tensor in layout.tensors.values() if tensor.conversion for part in tensor.sources}
    compared = (matrices | moved | {name for name in ours if name.endswith(".bias")}) - of_wide
    assert {name for name in compared if not np.array_equal(ours[name], converted[name].numpy())} == set()
    for name in wide:
        assert np.array_equal(np.concatenate([ours[part] for part in layout.tensors[name].sources]), original[name])
    back = next(each for each in other_layouts(original) if each.model == layout.model and not each.is_original)
    for part in of_wide & {name for name in ours if name.endswith(".weight")}:
        conversion = back.tensors[part].conversion
        assert conversion is not None
        (piece,) = conversion.assembled(wide.__getitem__)[part].pieces
        assert piece.indices[0].tolist() == converted[part].flatten().tolist()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.model)
def test_every_row_has_the_same_numbers_on_both_sides(table):
    for row in table.rows:
        assert len({name.count("{}") for name in (row.original, *row.parts)}) == 1
    assert len({(row.original, row.parts) for row in table.rows}) == len(table.rows)


def test_each_class_has_a_model_in_these_tests():
    classes = {name for table in TABLES for name in table.diffusers_classes}
    assert classes == {type(transformer(model)).__name__ for model in CONVERTERS}


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
