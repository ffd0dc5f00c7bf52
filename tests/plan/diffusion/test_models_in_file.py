"""One file with all models of a pipeline: an adapter for several of them changes each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import merge, unmerge, verify
from lora_export.errors import InputRefused
from lora_export.lora import component_name
from lora_export.plan import Layout, TensorSpec, make
from lora_export.plan.diffusion.models_in_file import prefixes_of_models, tensors_of_model
from support.diffusion import adapter_file, arrays_of, change, random_pairs, unet
from support.plans import holding
from support.small_layers import a_pair

XL = {
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (4, 4, 3, 3),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight": (4, 4),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (6, 4),
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (12, 4),
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (6, 4),
    "first_stage_model.decoder.x.weight": (4, 4),
}
CHANGED = {
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (4, 4),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (6, 4),
    "lora_te2_text_model_encoder_layers_0_self_attn_k_proj": (4, 4),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": (6, 4),
}


def base_file(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    path = folder / "xl.safetensors"
    save_file({name: rng.standard_normal(shape).astype(np.float32) for name, shape in XL.items()}, path)
    return path


def test_every_model_of_a_file_is_changed(tmp_path):
    pairs = random_pairs(CHANGED)
    base, adapter = base_file(tmp_path), adapter_file(tmp_path / "a.safetensors", pairs, alpha=1)
    merge(base, adapter, tmp_path / "out.safetensors", weights=[2.0])
    new, old = load_file(tmp_path / "out.safetensors"), load_file(base)
    unet_name, text, packed, mlp = list(XL)[1:5]
    expected = {
        unet_name: change(pairs["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"], 1),
        text: change(pairs["lora_te1_text_model_encoder_layers_0_mlp_fc1"], 1),
        mlp: change(pairs["lora_te2_text_model_encoder_layers_0_mlp_fc1"], 1),
    }
    for name, value in expected.items():
        assert new[name] - old[name] == pytest.approx(value, abs=1e-6)
    keys = change(pairs["lora_te2_text_model_encoder_layers_0_self_attn_k_proj"], 1)
    assert (new[packed] - old[packed])[4:8] == pytest.approx(keys, abs=1e-6)
    assert {name for name in XL if np.array_equal(new[name], old[name])} == {*list(XL)[:1], *list(XL)[5:]}
    result = verify(tmp_path / "out.safetensors", base=base, adapters=adapter, weights=[2.0])
    assert result.verdict.outcome == "same"
    assert len(result.about["adapters"]) == 1


def test_a_unet_with_the_names_of_diffusers_fits_the_original_file(tmp_path):
    """Stable Diffusion 1: kohya writes diffusers' names, and the file has those of the authors."""
    from lora_export.names.diffusion_layouts import other_layouts

    (layout,) = other_layouts(unet().state_dict())
    arrays = arrays_of(unet())
    original = {f"model.diffusion_model.{name}": arrays[tensor.sources[0]] for name, tensor in layout.tensors.items()}
    text = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    save_file({**original, text: np.ones((6, 4), np.float32)}, tmp_path / "sd.safetensors")
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pairs = random_pairs({f"unet.{module}": (64, 64), "te.text_model.encoder.layers.0.mlp.fc1": (6, 4)})
    adapter = adapter_file(tmp_path / "a.safetensors", pairs, prefix="lora_", flattened=True)
    result = merge(tmp_path / "sd.safetensors", adapter, tmp_path / "out.safetensors")
    new = load_file(tmp_path / "out.safetensors")
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    assert new[name] - original[name] == pytest.approx(change(pairs[f"unet.{module}"], 1), abs=1e-6)
    assert new[text] - 1 == pytest.approx(change(pairs["te.text_model.encoder.layers.0.mlp.fc1"], 1), abs=1e-6)
    assert result.plan.spellings == ("other layout",)


def specs(*names: str) -> list[TensorSpec]:
    return [TensorSpec(f"{name}.weight", (4, 4), "float32", Layout.OUT_IN) for name in names]


def test_a_model_alone_has_no_prefix():
    assert prefixes_of_models(["model.diffusion_model.a.weight", "other.weight"]) == {}
    assert prefixes_of_models(["text_encoders.clip_g.transformer.a", "model.diffusion_model.b"]) == {
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "denoiser": "model.diffusion_model.",
    }


def test_a_component_that_the_file_lacks_is_refused():
    base = {spec.name: spec for spec in specs("model.diffusion_model.a", "cond_stage_model.transformer.b")}
    assert [spec.name for spec in tensors_of_model(base, "text_encoder", "x")] == [
        "cond_stage_model.transformer.b.weight"
    ]
    with pytest.raises(
        InputRefused, match="x has changes for text_encoder_2, and the base does not: it contains denoiser"
    ):
        tensors_of_model(base, "text_encoder_2", "x")


def test_an_adapter_of_several_models_needs_a_file_with_them():
    names = (component_name("denoiser", "a"), component_name("text_encoder", "b"))
    adapter = holding(pairs={name: a_pair(4, 4) for name in names})
    with pytest.raises(InputRefused, match="has changes for several models of a pipeline"):
        make([adapter], specs("a", "b"))


def test_an_adapter_of_one_text_encoder_changes_that_one(tmp_path):
    """Both text encoders have modules of the same names, and here of the same shapes."""
    name = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    pairs = random_pairs({name: (6, 4)})
    base, adapter = base_file(tmp_path), adapter_file(tmp_path / "a.safetensors", pairs)
    merge(base, adapter, tmp_path / "out.safetensors")
    new, old = load_file(tmp_path / "out.safetensors"), load_file(base)
    changed = [each for each in XL if not np.array_equal(new[each], old[each])]
    assert changed == ["conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight"]
    assert new[changed[0]] - old[changed[0]] == pytest.approx(change(pairs[name], 1), abs=1e-6)


def test_a_merge_of_several_models_is_undone(tmp_path):
    base, adapter = base_file(tmp_path), adapter_file(tmp_path / "a.safetensors", random_pairs(CHANGED))
    merge(base, adapter, tmp_path / "out.safetensors", keep_residual=tmp_path / "residual")
    unmerge(tmp_path / "out.safetensors", adapter, tmp_path / "back.safetensors", base_from=tmp_path / "residual")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()
