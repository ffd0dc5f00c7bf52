"""kohya's adapters: flattened names, their components, and merges as diffusers makes them."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_export import formats, merge
from lora_export.errors import InputRefused, MatchError
from lora_export.names.diffusion_layouts import other_layouts
from lora_export.options.reading import ReadOptions
from support.diffusion import (
    PIPELINES,
    adapter_file,
    arrays_of,
    change,
    folder_of,
    linear_shapes,
    merged_as_fused,
    original_shapes,
    random_pairs,
    transformer,
    unet,
)

PAIR = random_pairs({"a.to_q": (4, 6)})


def test_rank_and_alpha_may_not_be_stated(tmp_path):
    path = adapter_file(tmp_path / "a.safetensors", PAIR, prefix="lora_unet_", flattened=True)
    with pytest.raises(InputRefused, match="lora_alpha= is for adapters that do not record it"):
        formats.load(path, options=ReadOptions(lora_alpha=4))


def test_names_that_the_base_lacks_are_listed_as_the_file_has_them(tmp_path):
    path = adapter_file(
        tmp_path / "a.safetensors", random_pairs({"no.layer": (4, 6)}), prefix="lora_unet_", flattened=True
    )
    with pytest.raises(MatchError, match=r"lora_unet_no_layer\.lora_down\.weight: the base has no weight for no_layer"):
        merge(folder_of(unet(), tmp_path / "unet"), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# diffusers reads these kinds of names; of Stable Diffusion XL's, kohya writes the original ones.
UNET_NAMES = ("attn", "ff.net", "proj_in", "proj_out", "conv1", "conv_shortcut", "time_emb_proj")


@pytest.mark.parametrize("like_sdxl", [False, True])
def test_a_unet_is_merged_as_diffusers_fuses_it(like_sdxl, tmp_path):
    model = unet(like_sdxl=like_sdxl)
    shapes = {
        name: shape
        for name, shape in linear_shapes(model, convolutions=True).items()
        if any(each in name for each in UNET_NAMES)
    }
    pairs = random_pairs(shapes)
    if like_sdxl:
        (layout,) = other_layouts(model.state_dict())
        original = {
            tensor.sources[0].removesuffix(".weight"): name.removesuffix(".weight")
            for name, tensor in layout.tensors.items()
        }
        pairs = {original[module]: pair for module, pair in pairs.items()}
    path = adapter_file(tmp_path / "a.safetensors", pairs, prefix="lora_unet_", flattened=True, alpha=1)
    pipeline = "StableDiffusionXLPipeline" if like_sdxl else "StableDiffusionPipeline"
    changed = merged_as_fused(model, pipeline, path, "unet", tmp_path, atol=2e-6)
    assert changed == {f"{module}.weight" for module in shapes}


@pytest.mark.parametrize("family", ["Flux 2", "Qwen-Image", "Z-Image", "Wan"])
def test_a_transformer_is_merged_as_diffusers_fuses_it(family, tmp_path):
    model = transformer(family)
    shapes = trained_shapes(family)
    path = adapter_file(tmp_path / "a.safetensors", random_pairs(shapes), prefix="lora_unet_", flattened=True, alpha=4)
    changed = merged_as_fused(model, PIPELINES[family], path, "transformer", tmp_path, atol=5e-6)
    assert len(changed) >= len(shapes)


def trained_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """The modules of a family, under the names that its trainers write, as far as diffusers reads them."""
    state = transformer(family).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    layout = next((each for each in other_layouts(state) if each.model == family), None)
    blocks = ("",) if layout is None else ("blocks.", "double_blocks.", "single_blocks.")
    if layout is not None and family != "Z-Image":
        shapes = original_shapes(layout, shapes)
    elif family == "Z-Image":
        blocks = ("layers.",)
    names = (name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2)
    return {name.removesuffix(".weight"): shapes[name] for name in names if name.startswith(blocks)}


def test_a_fused_projection_of_flux_is_split_into_its_modules(tmp_path):
    model = transformer("Flux")
    pairs = random_pairs({"single_blocks.0.linear1": (224, 32), "double_blocks.0.txt_attn.qkv": (96, 32)})
    path = adapter_file(tmp_path / "a.safetensors", pairs, prefix="lora_unet_", flattened=True, alpha=1)
    result = merge(folder_of(model, tmp_path / "model"), path, tmp_path / "out")
    assert result.plan.spellings == ("other layout",)
    assert any(
        "it has the names of Flux in the original model, the base has those of diffusers" in note
        for note in result.notes
    )
    ours, base = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), arrays_of(model)
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    changed = [ours[name] - base[name] for name in (f"single_transformer_blocks.0.{part}.weight" for part in parts)]
    assert np.concatenate(changed) == pytest.approx(change(pairs["single_blocks.0.linear1"], 0.5), abs=1e-6)
    added = [
        ours[name] - base[name] for name in (f"transformer_blocks.0.attn.add_{part}_proj.weight" for part in "qkv")
    ]
    assert np.concatenate(added) == pytest.approx(change(pairs["double_blocks.0.txt_attn.qkv"], 0.5), abs=1e-6)
