"""Tiny models of diffusers, adapters for them in every spelling, and what diffusers makes of these."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from lora_export import merge
from lora_export.names.diffusion_layouts import OtherLayout, other_layouts

Arrays = dict[str, NDArray[Any]]


def _seeded(build: Callable[[], nn.Module], std: float | None = 0.05) -> nn.Module:
    """A model with random parameters: of this deviation, or as its class initialises them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters() if std is not None else ():
            nn.init.normal_(parameter, std=std)
    return model


@functools.cache
def unet(*, like_sdxl: bool = False) -> nn.Module:
    """A UNet as Stable Diffusion has it; or as Stable Diffusion XL, with two layers a block."""
    from diffusers import UNet2DConditionModel

    own: dict[str, Any] = {"layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 8}
    if like_sdxl:
        own = {
            "layers_per_block": 2, "cross_attention_dim": 64, "attention_head_dim": (2, 4),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 80,
        }  # fmt: skip
    return _seeded(
        lambda: UNet2DConditionModel(
            block_out_channels=(32, 64),
            sample_size=8,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **own,
        ),
        std=None,  # with smaller weights, attention would hardly depend on its queries
    )


@functools.cache
def clip_text_model() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        bos_token_id=98,
        eos_token_id=99,
    )
    return _seeded(lambda: CLIPTextModel(config))


# The class of each family in diffusers, and the settings of a tiny model
TINY_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Flux": ("FluxTransformer2DModel", {
        "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20,
        "axes_dims_rope": [4, 4, 8], "guidance_embeds": True,
    }),
    "Chroma": ("ChromaTransformer2DModel", {
        "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 8),
        "approximator_num_channels": 16, "approximator_hidden_dim": 20, "approximator_layers": 2,
    }),
    "Flux 2": ("Flux2Transformer2DModel", {
        "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": [4, 4, 4, 4],
    }),
    "Stable Diffusion 3": ("SD3Transformer2DModel", {
        "sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 24,
        "pooled_projection_dim": 40, "out_channels": 4, "dual_attention_layers": (0,),
    }),
    "Wan": ("WanTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 20, "freq_dim": 32, "ffn_dim": 28, "num_layers": 2, "image_dim": 8,
        "added_kv_proj_dim": 24, "rope_max_seq_len": 32,
    }),
    "Wan-VACE": ("WanVACETransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 20, "freq_dim": 32, "ffn_dim": 28, "num_layers": 2, "vace_layers": [0, 1],
        "vace_in_channels": 6,
    }),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10,
        "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1,
        "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }),
    "Qwen-Image": ("QwenImageTransformer2DModel", {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (8, 4, 4),
    }),
    "Z-Image": ("ZImageTransformer2DModel", {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [32, 32, 32],
    }),
    "Lumina 2": ("Lumina2Transformer2DModel", {
        "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
        "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 2, 2),
        "cap_feat_dim": 16,
    }),
    # With the 48 blocks of the published model, which diffusers counts on
    "Mochi": ("MochiTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 6, "pooled_projection_dim": 8, "in_channels": 4,
        "text_embed_dim": 10, "time_embed_dim": 16,
    }),
    "AuraFlow": ("AuraFlowTransformer2DModel", {
        "sample_size": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
    }),
    "Sana": ("SanaTransformer2DModel", {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
        "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
        "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8,
    }),
    "LTX-Video": ("LTXVideoTransformer3DModel", {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
        "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 12,
    }),
}  # fmt: skip
PIPELINES = {
    "Flux": "FluxPipeline", "Flux 2": "Flux2Pipeline", "Wan": "WanPipeline",
    "HunyuanVideo": "HunyuanVideoPipeline", "Qwen-Image": "QwenImagePipeline", "Z-Image": "ZImagePipeline",
}  # fmt: skip


@functools.cache
def transformer(name: str) -> nn.Module:
    """A tiny transformer of a family in TINY_TRANSFORMERS. Callers must not change it."""
    import diffusers

    kind, settings = TINY_TRANSFORMERS[name]
    return _seeded(lambda: getattr(diffusers, kind)(**settings))


def headers_of(build: Callable[[], nn.Module], folder: Path) -> Path:
    """The folder of a model of any size, whose file of weights has a header and no bytes on disk."""
    with torch.device("meta"):
        model = build()
    header, end = {}, 0
    for name, value in model.state_dict().items():
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [end, end := end + 4 * value.numel()],
        }
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    model.save_config(folder)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def arrays_of(model: nn.Module) -> Arrays:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def folder_of(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def random_pairs(shapes: Mapping[str, tuple[int, ...]], *, rank: int = 2, seed: int = 0) -> dict[str, tuple[Any, Any]]:
    """A and B for weights of these (out, in, ...) shapes."""
    rng = np.random.default_rng(seed)
    return {
        module: (
            rng.standard_normal((rank, *shape[1:])).astype(np.float32),
            rng.standard_normal((shape[0], rank, *[1] * (len(shape) - 2))).astype(np.float32),
        )
        for module, shape in shapes.items()
    }


def change(pair: tuple[Any, Any], scale: float) -> NDArray[np.float64]:
    """scale * B A, in fp64."""
    a, b = (factor.astype(np.float64) for factor in pair)
    product: NDArray[np.float64] = scale * np.tensordot(b.reshape(len(b), -1), a, 1)
    return product


def adapter_file(
    path: Path,
    pairs: Mapping[str, tuple[Any, Any]],
    *,
    prefix: str = "",
    flattened: bool = False,
    spelling: tuple[str, str] = ("lora_down.weight", "lora_up.weight"),
    alpha: float | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """An adapter of one file, whose keys begin with `prefix`."""
    tensors: Arrays = {}
    for module, factors in pairs.items():
        name = prefix + (module.replace(".", "_") if flattened else module)
        tensors |= {f"{name}.{part}": factor for part, factor in zip(spelling, factors, strict=True)}
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path, metadata)
    return path


def linear_shapes(model: nn.Module, *, convolutions: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of linear layers, by module; with `convolutions`, of these too."""
    kinds = (nn.Linear, nn.Conv2d) if convolutions else nn.Linear
    return {name: tuple(layer.weight.shape) for name, layer in model.named_modules() if isinstance(layer, kinds)}


def merged_as_fused(
    model: nn.Module, pipeline: str, adapter: Path, part: str, folder: Path, *, atol: float
) -> set[str]:
    """The tensors that a merge changes. Its result is that of diffusers, up to `atol`."""
    merge(folder_of(model, folder / "model"), adapter, folder / "out")
    ours = load_file(folder / "out" / "diffusion_pytorch_model.safetensors")
    theirs, base = fused_by_diffusers(model, pipeline, adapter, part), arrays_of(model)
    assert {name: np.abs(ours[name] - theirs[name]).max() for name in ours} == pytest.approx(
        dict.fromkeys(ours, 0), abs=atol
    )
    return {name for name in ours if not np.array_equal(ours[name], base[name])}


def fused_by_diffusers(model: nn.Module, pipeline: str, adapter: Path, part: str) -> Arrays:
    """The weights of one part (unet, transformer) of a pipeline, after diffusers has loaded and fused the adapter."""
    import diffusers

    own = getattr(diffusers, pipeline)
    arguments = {"unet_config": model.config} if part == "unet" else {}
    state, *alphas, metadata = own.lora_state_dict(str(adapter), return_lora_metadata=True, **arguments)
    copied = type(model).from_config(model.config)
    copied.load_state_dict(model.state_dict())
    load = getattr(own, f"load_lora_into_{part}")
    load(state, **{part: copied}, metadata=metadata, **({"network_alphas": alphas[0]} if alphas else {}))
    copied.fuse_lora()
    copied.unload_lora()
    return arrays_of(copied)


# --- Checkpoints of the authors ---

CONVERTERS = {
    "Flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "Chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "Flux 2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "Stable Diffusion 3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "Wan": "convert_wan_transformer_to_diffusers",
    "Wan-VACE": "convert_wan_transformer_to_diffusers",
    "HunyuanVideo": "convert_hunyuan_video_transformer_to_diffusers",
    "Z-Image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "Lumina 2": "convert_lumina2_to_diffusers",
    "Mochi": "convert_mochi_transformer_checkpoint_to_diffusers",
    "AuraFlow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "Sana": "convert_sana_transformer_to_diffusers",
    "LTX-Video": "convert_ltx_transformer_checkpoint_to_diffusers",
}


class WithOthers(dict[str, torch.Tensor]):
    """The tensors of a checkpoint. The norms and buffers that the layouts do not name are zeros."""

    def pop(self, key: str, *_: object) -> torch.Tensor:
        return super().pop(key, torch.zeros(2, 1))


def converted_by_diffusers(model: str, checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of diffusers that its own code makes of a checkpoint of the authors."""
    from diffusers.loaders import single_file_utils

    convert = getattr(single_file_utils, CONVERTERS[model])
    return {name: value for name, value in convert(WithOthers(checkpoint)).items() if value is not None}


def layout_of(model: str) -> OtherLayout:
    names, own = transformer(model).state_dict(), type(transformer(model)).__name__
    return next(layout for layout in other_layouts(names) if own in layout.diffusers_classes)


def original_shapes(layout: OtherLayout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        name: shapes[tensor.stored]
        if tensor.conversion is None
        else tensor.conversion.assembled(shapes.__getitem__)[name].shape
        for name, tensor in layout.tensors.items()
    }
