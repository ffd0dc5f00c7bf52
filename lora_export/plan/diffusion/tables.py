"""What diffusers calls the modules of the models' original code, as data.

Each row has a module of the original model and the modules of diffusers that have its weights; `{}` is a number.
Modules that no row names have one name in both. The facts are those of diffusers' single-file loaders (0.42); the tests
compare the results with diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RowOrder(StrEnum):
    """How the rows of an original weight relate to those of the modules of diffusers."""

    EQUAL = "equal"  # one after another, all of one size
    SQUARE_THEN_REST = "square, then the rest"  # all but the last are square matrices
    SWAPPED = "swapped"  # the two halves (shift, scale) in the other order
    SWAPPED_PAIR = "swapped pair"  # as SWAPPED where the weight has just these two; else unchanged


@dataclass(frozen=True)
class TableRow:
    """One module of the original model, and what diffusers calls it."""

    original: str
    parts: tuple[str, ...]
    rows: RowOrder = RowOrder.EQUAL


@dataclass(frozen=True)
class NameTable:
    """The names of one family of models. RowOrder with a number recognise it."""

    model: str
    diffusers_class: str  # the class of such a model in diffusers; empty where it has none
    rows: tuple[TableRow, ...]


def _rows(original: str, diffusers: str, pairs: dict[str, str | tuple[str, ...]], rows: RowOrder) -> list[TableRow]:
    """RowOrder with these prefixes before the names."""
    return [
        TableRow(original + one, tuple(diffusers + each for each in ((many,) if isinstance(many, str) else many)), rows)
        for one, many in pairs.items()
    ]


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
FINAL_SWAPPED = {"final_layer.adaLN_modulation.1": "norm_out.linear"}

FLUX = NameTable(
    "Flux",
    "FluxTransformer2DModel",
    (
        *_rows(
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            {
                "img_attn.qkv": QKV,
                "img_attn.proj": "attn.to_out.0",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "img_mod.lin": "norm1.linear",
                "txt_attn.qkv": ADDED_QKV,
                "txt_attn.proj": "attn.to_add_out",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
                "txt_mod.lin": "norm1_context.linear",
            },
            RowOrder.EQUAL,
        ),
        *_rows(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.",
            {"linear1": (*QKV, "proj_mlp"), "linear2": "proj_out", "modulation.lin": "norm.linear"},
            RowOrder.SQUARE_THEN_REST,
        ),
        *_rows(
            "",
            "",
            {
                "img_in": "x_embedder",
                "txt_in": "context_embedder",
                "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
                "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
                "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
                "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
                "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
                "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
                "final_layer.linear": "proj_out",
            },
            RowOrder.EQUAL,
        ),
        *_rows("", "", {**FINAL_SWAPPED}, RowOrder.SWAPPED),
    ),
)

FLUX_2 = NameTable(
    "Flux 2",
    "Flux2Transformer2DModel",
    (
        *_rows(
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            {
                "img_attn.qkv": QKV,
                "img_attn.proj": "attn.to_out.0",
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_attn.qkv": ADDED_QKV,
                "txt_attn.proj": "attn.to_add_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
            RowOrder.EQUAL,
        ),
        *_rows(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.attn.",
            {"linear1": "to_qkv_mlp_proj", "linear2": "to_out"},
            RowOrder.EQUAL,
        ),
        *_rows(
            "",
            "",
            {
                "img_in": "x_embedder",
                "txt_in": "context_embedder",
                "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
                "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
                "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
                "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
                "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
                "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
                "single_stream_modulation.lin": "single_stream_modulation.linear",
                "final_layer.linear": "proj_out",
            },
            RowOrder.EQUAL,
        ),
        *_rows("", "", {**FINAL_SWAPPED}, RowOrder.SWAPPED),
    ),
)

SD_3 = NameTable(
    "Stable Diffusion 3",
    "SD3Transformer2DModel",
    (
        *_rows(
            "joint_blocks.{}.",
            "transformer_blocks.{}.",
            {
                "x_block.attn.qkv": QKV,
                "x_block.attn.proj": "attn.to_out.0",
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn2.proj": "attn2.to_out.0",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "x_block.adaLN_modulation.1": "norm1.linear",
                "context_block.attn.qkv": ADDED_QKV,
                "context_block.attn.proj": "attn.to_add_out",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
            },
            RowOrder.EQUAL,
        ),
        # The last block's has no gates: only shift and scale.
        TableRow(
            "joint_blocks.{}.context_block.adaLN_modulation.1",
            ("transformer_blocks.{}.norm1_context.linear",),
            RowOrder.SWAPPED_PAIR,
        ),
        *_rows(
            "",
            "",
            {
                "x_embedder.proj": "pos_embed.proj",
                "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
                "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
                "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
                "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
                "final_layer.linear": "proj_out",
            },
            RowOrder.EQUAL,
        ),
        *_rows("", "", {**FINAL_SWAPPED}, RowOrder.SWAPPED),
    ),
)

WAN = NameTable(
    "Wan",
    "WanTransformer3DModel",
    (
        *_rows(
            "blocks.{}.",
            "blocks.{}.",
            {
                "self_attn.q": "attn1.to_q",
                "self_attn.k": "attn1.to_k",
                "self_attn.v": "attn1.to_v",
                "self_attn.o": "attn1.to_out.0",
                "self_attn.norm_q": "attn1.norm_q",
                "self_attn.norm_k": "attn1.norm_k",
                "cross_attn.q": "attn2.to_q",
                "cross_attn.k": "attn2.to_k",
                "cross_attn.v": "attn2.to_v",
                "cross_attn.o": "attn2.to_out.0",
                "cross_attn.k_img": "attn2.add_k_proj",
                "cross_attn.v_img": "attn2.add_v_proj",
                "cross_attn.norm_q": "attn2.norm_q",
                "cross_attn.norm_k": "attn2.norm_k",
                "cross_attn.norm_k_img": "attn2.norm_added_k",
                "norm3": "norm2",
                "ffn.0": "ffn.net.0.proj",
                "ffn.2": "ffn.net.2",
            },
            RowOrder.EQUAL,
        ),
        *_rows(
            "",
            "",
            {
                "time_embedding.0": "condition_embedder.time_embedder.linear_1",
                "time_embedding.2": "condition_embedder.time_embedder.linear_2",
                "text_embedding.0": "condition_embedder.text_embedder.linear_1",
                "text_embedding.2": "condition_embedder.text_embedder.linear_2",
                "time_projection.1": "condition_embedder.time_proj",
                "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
                "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
                "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
                "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
                "head.head": "proj_out",
            },
            RowOrder.EQUAL,
        ),
    ),
)

HUNYUAN_VIDEO = NameTable(
    "HunyuanVideo",
    "HunyuanVideoTransformer3DModel",
    (
        *_rows(
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            {
                "img_attn_qkv": QKV,
                "img_attn_proj": "attn.to_out.0",
                "img_mlp.fc1": "ff.net.0.proj",
                "img_mlp.fc2": "ff.net.2",
                "img_mod.linear": "norm1.linear",
                "txt_attn_qkv": ADDED_QKV,
                "txt_attn_proj": "attn.to_add_out",
                "txt_mlp.fc1": "ff_context.net.0.proj",
                "txt_mlp.fc2": "ff_context.net.2",
                "txt_mod.linear": "norm1_context.linear",
            },
            RowOrder.EQUAL,
        ),
        *_rows(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.",
            {"linear1": (*QKV, "proj_mlp"), "linear2": "proj_out", "modulation.linear": "norm.linear"},
            RowOrder.SQUARE_THEN_REST,
        ),
        *_rows(
            "txt_in.individual_token_refiner.blocks.{}.",
            "context_embedder.token_refiner.refiner_blocks.{}.",
            {
                "self_attn_qkv": QKV,
                "self_attn_proj": "attn.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
                "adaLN_modulation.1": "norm_out.linear",
            },
            RowOrder.EQUAL,
        ),
        *_rows(
            "",
            "",
            {
                "img_in.proj": "x_embedder.proj",
                "txt_in.input_embedder": "context_embedder.proj_in",
                "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
                "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
                "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
                "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
                "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
                "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
                "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
                "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
                "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
                "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
                "final_layer.linear": "proj_out",
            },
            RowOrder.EQUAL,
        ),
        *_rows("", "", {**FINAL_SWAPPED}, RowOrder.SWAPPED),
    ),
)


def _z_image_block(name: str) -> list[TableRow]:
    qkv = ("attention.to_q", "attention.to_k", "attention.to_v")
    pairs: dict[str, str | tuple[str, ...]] = {
        "attention.qkv": qkv,
        "attention.out": "attention.to_out.0",
        "attention.q_norm": "attention.norm_q",
        "attention.k_norm": "attention.norm_k",
    }
    return _rows(f"{name}.{{}}.", f"{name}.{{}}.", pairs, RowOrder.EQUAL)


Z_IMAGE = NameTable(
    "Z-Image",
    "ZImageTransformer2DModel",
    (
        *_z_image_block("layers"),
        *_z_image_block("noise_refiner"),
        *_z_image_block("context_refiner"),
        *_rows(
            "",
            "",
            {
                "x_embedder": "all_x_embedder.2-1",
                "final_layer.linear": "all_final_layer.2-1.linear",
                "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            },
            RowOrder.EQUAL,
        ),
    ),
)

# Stable Diffusion XL's second text encoder: OpenCLIP's names, and transformers'.
OPEN_CLIP = NameTable(
    "OpenCLIP",
    "",  # a class of transformers
    tuple(
        _rows(
            "transformer.resblocks.{}.",
            "text_model.encoder.layers.{}.",
            {
                "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attn.out_proj": "self_attn.out_proj",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
            },
            RowOrder.EQUAL,
        )
    ),
)

TABLES = (FLUX, FLUX_2, SD_3, WAN, HUNYUAN_VIDEO, Z_IMAGE, OPEN_CLIP)
