"""Models of diffusers, in folders of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_export as le
from lora_export.errors import InputRefused
from lora_export.models.load import load_model
from support.diffusion import unet
from support.slow import slow


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=8,
    ).eval()  # fmt: skip


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=16,
    ).eval()  # fmt: skip


def flux(*, has_guidance: bool = True) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=has_guidance, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


def pixart(*, has_sizes: bool = False) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, cross_attention_dim=24, caption_channels=12, norm_num_groups=1,
        use_additional_conditions=has_sizes,
    ).eval()  # fmt: skip


MODELS = {
    "flux": flux,
    "schnell": lambda: flux(has_guidance=False),
    "unet": unet,
    "sdxl": lambda: unet(like_sdxl=True),
    "dit": dit,
    "sd3": sd3,
    "pixart": pixart,
    "pixart of sizes": lambda: pixart(has_sizes=True),
}
NESTED = {"sdxl": ("text_embeds", "time_ids"), "pixart of sizes": ("resolution", "aspect_ratio")}
OF_POSITIONS = ("img_ids", "txt_ids")  # without a batch


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_diffusers_computes(name: str, tmp_path: Path) -> None:
    theirs: Any = MODELS[name]()
    theirs.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    inputs = model.inputs(model.checked_sizes({})[1], seed=1)
    nested = NESTED.get(name, ())
    given: dict[str, Any] = {key: value for key, value in inputs.items() if key not in nested}
    if nested:
        given["added_cond_kwargs"] = {key: inputs[key] for key in nested}
    with torch.no_grad():
        found, wanted = model.module(**inputs), theirs(**given).sample
    assert list(found) == ["out_sample"] and torch.equal(found["out_sample"], wanted)
    assert all(inputs[key].shape[0] == 3 for key in inputs if key not in OF_POSITIONS)


def test_weights_that_a_folder_lacks_are_not_random(tmp_path: Path) -> None:
    dit().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"other.weight": torch.ones(3)}, file)
    (note,) = load_model(str(tmp_path)).notes
    assert (
        note == "the model leaves out 1 tensor of the folder, which DiTTransformer2DModel does not have: other.weight"
    )
    del tensors["proj_out_1.weight"]
    save_file(tensors, file)
    with pytest.raises(InputRefused, match=r"lacks weights of DiTTransformer2DModel.*\n  proj_out_1.weight"):
        load_model(str(tmp_path))


def test_the_sides_of_an_image_can_be_halved(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    for sizes in load_model(str(tmp_path)).checked_sizes({}):
        assert sizes["height"] % 2 == sizes["width"] % 2 == 0


@pytest.mark.parametrize(
    ("make", "names"),
    [
        slow(dit, ["hidden_states", "timestep", "class_labels"]),
        (pixart, ["hidden_states", "encoder_hidden_states", "timestep"]),
    ],
)
def test_a_graph_with_an_adapter_is_proven_and_has_optimums_names(
    make: Callable[[], nn.Module], names: list[str], tmp_path: Path
) -> None:
    module = make()
    module.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    options = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    peft.get_peft_model(module, options).save_pretrained(tmp_path / "adapter")
    result = le.export_onnx(tmp_path / "base", tmp_path / "m", adapters=tmp_path / "adapter", lora="nodes")
    session = ort.InferenceSession(result.output)
    assert [value.name for value in session.get_inputs()] == names
    assert [value.name for value in session.get_outputs()] == ["out_sample"]


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["merged", "nodes"])
def test_flux_with_an_adapter_is_proven(lora: str, tmp_path: Path) -> None:
    module = flux()
    module.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(module, options).save_pretrained(tmp_path / "adapter")
    result = le.export_onnx(tmp_path / "base", tmp_path / "m", adapters=tmp_path / "adapter", lora=lora)
    assert result.proof is not None and result.proof.verdict.same
    shapes = {value.name: value.shape for value in ort.InferenceSession(result.output).get_inputs()}
    assert shapes["hidden_states"] == ["batch", "patches", 8] and shapes["img_ids"] == ["patches", 3]
    assert shapes["guidance"] == ["batch"]


def changed(folder: Path, **fields: Any) -> Path:
    dit().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "is a AutoencoderKL of diffusers, whose inputs are not known"),
        ({"_class_name": "os.system"}, "whose inputs are not known"),
        ({"num_layers": "two"}, "diffusers cannot load it as DiTTransformer2DModel"),
        ({"_class_name": "UNet2DConditionModel"}, "diffusers cannot load it as UNet2DConditionModel"),
    ],
)
def test_other_models_and_damaged_ones_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=message):
        load_model(str(changed(tmp_path, **fields)))


def test_further_inputs_that_are_not_sdxls_are_refused(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_embed_type": "timestep"}))
    with pytest.raises(InputRefused, match="further inputs of SDXL"):
        load_model(str(tmp_path))
