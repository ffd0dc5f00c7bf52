"""A base under the names of its other layout: prefixes, biases, and what has no other layout."""

from __future__ import annotations

import pytest

from lora_export.names.diffusion_layouts import other_layouts
from lora_export.names.tensor_parts import NotExpressible

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
