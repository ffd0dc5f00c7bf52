"""Adapters of diffusers: every spelling, the recorded LoraConfig, and merges as diffusers makes them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import formats, merge
from lora_export.errors import InputRefused
from lora_export.formats import diffusers
from support.diffusion import adapter_file, arrays_of, folder_of, linear_shapes, merged_as_fused, random_pairs, unet

PAIR = random_pairs({"a.to_q": (4, 6)})
SPELLINGS = {"PEFT": ("lora_A.weight", "lora_B.weight"), "diffusers": ("lora.down.weight", "lora.up.weight")}


def test_the_oldest_names_of_a_text_encoder_are_its_own(tmp_path):
    keys = {
        f"text_encoder.layers.0.self_attn.{layer}_lora.{side}.weight": np.ones((3, 3), np.float32)
        for layer in ("to_q", "to_out")
        for side in ("down", "up")
    }
    save_file(keys, tmp_path / "a.safetensors")
    names = list(diffusers.read(tmp_path / "a.safetensors", "x").pairs)
    assert sorted(names) == [f"text_encoder/layers.0.self_attn.{layer}" for layer in ("out_proj", "q_proj")]


@pytest.mark.parametrize("spelling", [*SPELLINGS, "attention processors"])
def test_a_unet_is_merged_as_diffusers_fuses_it(spelling, tmp_path):
    model = unet()
    shapes = {name: shape for name, shape in linear_shapes(model).items() if ".attn" in name}
    pairs = random_pairs(shapes)
    if spelling in SPELLINGS:
        path = adapter_file(tmp_path / "a.safetensors", pairs, prefix="unet.", spelling=SPELLINGS[spelling])
    else:
        path = tmp_path / "a.safetensors"
        tensors = {}
        for module, factors in pairs.items():
            block, layer = module.rsplit(".attn", 1)
            number, what = layer[0], layer[2:].removesuffix(".0")
            for side, factor in zip(("down", "up"), factors, strict=True):
                tensors[f"unet.{block}.attn{number}.processor.{what}_lora.{side}.weight"] = factor
        save_file(tensors, path)
    changed = merged_as_fused(model, "StableDiffusionPipeline", path, "unet", tmp_path, atol=2e-6)
    assert changed == {f"{module}.weight" for module in shapes}


def test_an_adapter_that_diffusers_saves_keeps_its_ranks_and_alphas(tmp_path):
    """Mixed ranks and alphas are in the header only."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    model = type(unet()).from_config(unet().config)
    model.load_state_dict(unet().state_dict())
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_v"],
        rank_pattern={"mid_block.*to_q": 2},
        alpha_pattern={"mid_block.*to_q": 7},
        init_lora_weights=False,
    )
    model.add_adapter(config)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "a", unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict()
    )
    adapter = formats.load(tmp_path / "a")
    scales = {pair.scale for module, pair in adapter.pairs.items() if "mid_block" in module and module.endswith("to_q")}
    assert (adapter.name, scales) == ("a", {3.5})
    assert {pair.scale for pair in adapter.pairs.values()} == {3.5, 0.5}
    merge(folder_of(unet(), tmp_path / "unet"), tmp_path / "a", tmp_path / "out")
    ours = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    model.fuse_lora()
    model.unload_lora()
    theirs = arrays_of(model)
    assert {name: np.abs(ours[name] - theirs[name]).max() for name in ours} == pytest.approx(
        dict.fromkeys(ours, 0), abs=2e-6
    )


def recorded(**fields: object) -> dict[str, str]:
    return {
        "lora_adapter_metadata": json.dumps(
            {f"unet.{name}": value for name, value in {"r": 2, "lora_alpha": 8, **fields}.items()}
        )
    }


@pytest.mark.parametrize(
    ("metadata", "alpha", "message"),
    [
        (recorded(r=3), None, "its rank is 2, and lora_adapter_metadata in the header of .* states 3"),
        (recorded(), 4.0, "it has an alpha of its own beside lora_adapter_metadata"),
        (recorded(use_qalora=True), None, "use_qalora: QA-LoRA is not supported"),
        (recorded(lora_alpha=0), None, "lora_alpha is 0; it must be a number other than 0"),
        ({"lora_adapter_metadata": "["}, None, "lora_adapter_metadata in the header of .* is not JSON"),
        (
            {"lora_adapter_metadata": '{"r": 2, "lora_alpha": 16}'},
            None,
            "for modules without a model that the file lacks",
        ),
        (recorded(use_dora=True), None, "use_dora is True, and 0 of 1 pairs have magnitudes"),
        (recorded(peft_type="LOHA"), None, "peft_type is 'LOHA'; only LORA is supported"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 32}'}, None, "r is None; it must be a positive number"),
    ],
)
def test_a_recorded_config_that_does_not_fit_is_refused(metadata, alpha, message, tmp_path):
    path = adapter_file(tmp_path / "a.safetensors", PAIR, prefix="unet.", alpha=alpha, metadata=metadata)
    with pytest.raises(InputRefused, match=message):
        formats.load(path)


def test_the_config_of_one_component_leaves_the_others_alone(tmp_path):
    pairs = {"unet.a": PAIR["a.to_q"], "text_encoder.a": PAIR["a.to_q"]}
    path = adapter_file(tmp_path / "a.safetensors", pairs, metadata=recorded(use_rslora=True))
    scales = {name: pair.scale for name, pair in formats.load(path).pairs.items()}
    assert scales == {"denoiser/a": pytest.approx(8 / 2**0.5), "text_encoder/a": 1.0}
