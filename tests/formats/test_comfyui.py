"""ComfyUI's adapters: `diffusion_model.` before the original names, merged as diffusers makes them."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_export import merge
from support.diffusion import (
    PIPELINES,
    adapter_file,
    arrays_of,
    change,
    folder_of,
    merged_as_fused,
    random_pairs,
    transformer,
)

# What diffusers converts of each family.
MODULES = {
    "Flux": {
        "double_blocks.0.img_attn.qkv": (96, 32),
        "double_blocks.0.img_mlp.0": (128, 32),
        "single_blocks.0.linear2": (32, 160),
    },
    "Wan": {"blocks.1.self_attn.o": (24, 24), "blocks.0.cross_attn.k": (24, 24), "blocks.0.ffn.2": (24, 28)},
    "Qwen-Image": {"transformer_blocks.1.attn.to_add_out": (32, 32), "transformer_blocks.0.img_mod.1": (192, 32)},
}


@pytest.mark.parametrize("family", ["Wan", "Qwen-Image"])
def test_a_transformer_is_merged_as_diffusers_fuses_it(family, tmp_path):
    model, pairs = transformer(family), random_pairs(MODULES[family])
    path = adapter_file(
        tmp_path / "a.safetensors", pairs, prefix="diffusion_model.", spelling=("lora_A.weight", "lora_B.weight")
    )
    changed = merged_as_fused(model, PIPELINES[family], path, "transformer", tmp_path, atol=5e-6)
    assert len(changed) == len(pairs)


def test_modules_of_flux_get_the_change_of_the_original_ones(tmp_path):
    model, pairs = transformer("Flux"), random_pairs(MODULES["Flux"])
    path = adapter_file(tmp_path / "a.safetensors", pairs, prefix="diffusion_model.")
    merge(folder_of(model, tmp_path / "model"), path, tmp_path / "out")
    ours, base = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), arrays_of(model)
    block = "transformer_blocks.0"
    expected = {
        "double_blocks.0.img_attn.qkv": [f"{block}.attn.to_{part}" for part in "qkv"],
        "double_blocks.0.img_mlp.0": [f"{block}.ff.net.0.proj"],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    }
    for module, parts in expected.items():
        changed = np.concatenate([ours[f"{part}.weight"] - base[f"{part}.weight"] for part in parts])
        assert changed == pytest.approx(change(pairs[module], 1), abs=1e-6)


def test_a_stacked_projection_with_a_tripled_alpha_is_three_pairs(tmp_path):
    """Z-Image's adapters for ComfyUI: A is stacked, B block-diagonal, and alpha is three times as large."""
    model = transformer("Z-Image")
    own = random_pairs({f"to_{part}": (32, 32) for part in "qkv"})
    a = np.concatenate([own[f"to_{part}"][0] for part in "qkv"])
    b = np.zeros((96, 6), np.float32)
    for number, part in enumerate("qkv"):
        b[32 * number : 32 * (number + 1), 2 * number : 2 * (number + 1)] = own[f"to_{part}"][1]
    path = adapter_file(
        tmp_path / "a.safetensors", {"layers.0.attention.qkv": (a, b)}, prefix="diffusion_model.", alpha=3
    )
    merge(folder_of(model, tmp_path / "model"), path, tmp_path / "out")
    ours, base = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), arrays_of(model)
    for part in "qkv":
        name = f"layers.0.attention.to_{part}.weight"
        assert ours[name] - base[name] == pytest.approx(change(own[f"to_{part}"], 0.5), abs=1e-6)
