"""The models of a diffusion pipeline: components of an adapter, the family, and all models in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import merge, unmerge, verify
from lora_export.errors import InputRefused, MatchError
from lora_export.lora import COMPONENTS, Adapter, component_name, split_component
from lora_export.plan import Layout, TensorSpec, make
from lora_export.plan.diffusion import (
    COMPONENT_OPTIONS,
    Family,
    by_role,
    chosen_component,
    components_of,
    family_of_model,
    family_of_names,
    family_of_pipeline,
    listed_components,
    of_component,
    only_component,
    prefixes_of_models,
    tensors_of_model,
)
from support.diffusion import adapter_file, arrays_of, change, random_pairs, unet
from support.plans import holding
from support.small_layers import a_pair

ONES = np.ones(4, np.float32)


def adapter(*names: str, **fields) -> Adapter:
    pairs = {name: a_pair(4, 4) for name in names}
    spelling = {name: f"key of {name}" for name in names}
    return Adapter("x", "diffusers", pairs, layouts=dict.fromkeys(names, "out_in"), spelling=spelling, **fields)


BOTH = ("text_encoder/q", "denoiser/a.b", "denoiser/c")


def test_components_are_listed_in_their_order():
    assert components_of(adapter(*BOTH)) == ["denoiser", "text_encoder"]
    assert components_of(adapter("a", biases={"text_encoder_2/b": ONES}, added={"denoiser/n.weight": ONES})) == [
        *("", "denoiser", "text_encoder_2")
    ]


def test_a_slash_in_another_name_is_no_component():
    assert split_component("model/a") == ("", "model/a")
    assert split_component(component_name("denoiser", "a/b")) == ("denoiser", "a/b")
    assert component_name("", "a") == "a"


def test_the_part_of_a_component_has_plain_names():
    one = of_component(adapter(*BOTH, biases={"denoiser/c": ONES}, added={"text_encoder/n.weight": ONES}), "denoiser")
    assert (list(one.pairs), list(one.biases), list(one.added)) == (["a.b", "c"], ["c"], [])
    assert (dict(one.layouts), one.spelled("a.b")) == ({"a.b": "out_in", "c": "out_in"}, "key of denoiser/a.b")
    assert list(of_component(adapter(*BOTH), "denoiser", named=True).pairs) == ["denoiser/a.b", "denoiser/c"]


def test_the_only_component_needs_no_choice():
    plain = adapter("a", "b")
    assert only_component(plain) is plain
    assert list(only_component(adapter("denoiser/a")).pairs) == ["a"]


def test_several_components_need_a_choice():
    with pytest.raises(
        InputRefused, match="x has changes for several models of a pipeline: unet or transformer, text_"
    ):
        only_component(adapter(*BOTH))
    chosen = chosen_component(adapter(*BOTH), "unet")
    assert list(only_component(chosen).pairs) == ["a.b", "c"]
    assert chosen.notes == ("x: only its changes of unet are used, not those of text_encoder.",)
    assert chosen_component(adapter(*BOTH), "").pairs.keys() == set(BOTH)


def test_a_choice_of_the_only_component_is_no_news():
    assert chosen_component(adapter("denoiser/a"), "transformer").notes == ()


def test_a_component_that_an_adapter_lacks_is_refused():
    with pytest.raises(
        InputRefused, match="x has no changes for text_encoder_2\\. It has some for unet or transformer"
    ):
        chosen_component(adapter("denoiser/a"), "text_encoder_2")
    with pytest.raises(InputRefused, match="It has some for modules without a component"):
        chosen_component(adapter("a"), "unet")


def test_every_component_can_be_chosen():
    assert set(COMPONENT_OPTIONS.values()) == set(COMPONENTS)
    assert listed_components(["denoiser_2", "text_encoder_3"]) == "transformer_2, text_encoder_3 (T5)"


# --- The family ---


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("StableDiffusionPipeline", Family.SD),
        ("StableDiffusionImg2ImgPipeline", Family.SD),
        ("StableDiffusionXLInpaintPipeline", Family.XL),
        ("StableDiffusion3Pipeline", Family.SD_3),
        ("FluxFillPipeline", Family.FLUX),
        ("Flux2Pipeline", Family.OTHER_TRANSFORMER),
        ("WanPipeline", Family.UNKNOWN),
        ("", Family.UNKNOWN),
    ],
)
def test_the_class_of_a_pipeline(name, family):
    assert family_of_pipeline(name) is family


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time"}, Family.XL),
        ({"_class_name": "UNet2DConditionModel", "addition_embed_type": None}, Family.SD),
        ({"_class_name": "SD3Transformer2DModel"}, Family.SD_3),
        ({"_class_name": "FluxTransformer2DModel"}, Family.FLUX),
        ({"_class_name": "WanTransformer3DModel"}, Family.OTHER_TRANSFORMER),
        ({"model_type": "clip_text_model"}, Family.UNKNOWN),
    ],
)
def test_the_config_of_a_model(config, family):
    assert family_of_model(config) is family


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["denoiser/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"], Family.SD),
        (["denoiser/down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"], Family.XL),
        (["input_blocks.1.1.proj_in", "text_encoder_2/a"], Family.XL),
        (["denoiser/single_blocks_0_linear1"], Family.FLUX),
        (["denoiser/single_transformer_blocks.0.proj_mlp"], Family.FLUX),
        (["denoiser/joint_blocks.0.x_block.attn.qkv"], Family.SD_3),
        (["denoiser/transformer_blocks.0.attn.to_q"], Family.OTHER_TRANSFORMER),
        (["text_encoder_2/a", "text_encoder_3/a"], Family.SD_3),
        (["text_encoder/a", "text_encoder_2/a"], Family.XL),
        (["text_encoder/a"], Family.UNKNOWN),
    ],
)
def test_the_names_in_an_adapter(names, family):
    assert family_of_names(names) is family


def test_t5_is_the_third_text_encoder():
    assert by_role("text_encoder_2/encoder.block.0.layer.0.SelfAttention.q") == (
        "text_encoder_3/encoder.block.0.layer.0.SelfAttention.q"
    )
    for name in ("text_encoder_2/text_model.encoder.layers.0.mlp.fc1", "text_encoder/encoder.block.0.layer.0.q", "a"):
        assert by_role(name) == name


# --- One file with all models of a pipeline: an adapter for several of them changes each ---

XL = {
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (4, 4, 3, 3),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight": (4, 4),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (6, 4),
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (12, 4),
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (6, 4),
    "conditioner.embedders.1.model.text_projection": (4, 4),  # (in, out), as OpenCLIP has it
    "first_stage_model.decoder.x.weight": (4, 4),
}
CHANGED = {
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (4, 4),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (6, 4),
    "lora_te2_text_model_encoder_layers_0_self_attn_k_proj": (4, 4),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": (6, 4),
    "lora_te2_text_projection": (4, 4),
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
    unet_name, text, packed, mlp, projection = list(XL)[1:6]
    expected = {
        unet_name: change(pairs["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"], 1),
        text: change(pairs["lora_te1_text_model_encoder_layers_0_mlp_fc1"], 1),
        mlp: change(pairs["lora_te2_text_model_encoder_layers_0_mlp_fc1"], 1),
        projection: change(pairs["lora_te2_text_projection"], 1).T,
    }
    for name, value in expected.items():
        assert new[name] - old[name] == pytest.approx(value, abs=1e-6)
    keys = change(pairs["lora_te2_text_model_encoder_layers_0_self_attn_k_proj"], 1)
    assert (new[packed] - old[packed])[4:8] == pytest.approx(keys, abs=1e-6)
    assert {name for name in XL if np.array_equal(new[name], old[name])} == {*list(XL)[:1], *list(XL)[6:]}
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
    lacking = "x has changes for {}, which the base lacks: it contains unet or transformer, text_encoder. Choose"
    for component, shown in (("text_encoder_2", "text_encoder_2"), ("", "modules without a component")):
        with pytest.raises(InputRefused, match=lacking.format(shown)):
            tensors_of_model(base, component, "x")


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


@pytest.mark.parametrize("flattened", [False, True])
def test_names_around_show_the_layout_of_a_few_layers(flattened):
    module, original = ("mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "middle_block.1.transformer_blocks.0")
    names, spec = arrays_of(unet()), TensorSpec(f"{module}.weight", (4, 4), "float32", Layout.OUT_IN)
    name = f"{original}.attn2.to_q"
    own = adapter(name.replace(".", "_") if flattened else name, flattened=flattened)
    with pytest.raises(MatchError):
        make([own], [spec])
    plan = make([own], [spec], around=names)
    assert [step.weight for step in plan.steps] == [spec.name] and not plan.kept
