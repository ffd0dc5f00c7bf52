"""Adapters under the names of a checkpoint or of the loaded model: each merges to what the original merges to."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers import CogView4Transformer2DModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_export
from lora_export import formats
from lora_export.api.adapter_names import _placed, family_of_base, named_for_pipeline
from lora_export.errors import InputRefused, MatchError
from lora_export.lora import Adapter, LoraPair
from lora_export.pairs.structured import HadamardPair, WholePair
from lora_export.plan import Layout, TensorSpec
from lora_export.plan.diffusion import Family
from lora_export.plan.match_names import BaseTensors
from support import experts
from support.diffusion import (
    PIPELINES,
    adapter_file,
    arrays_of,
    change,
    clip_text_model,
    converted_by_diffusers,
    folder_of,
    fused_by_diffusers,
    headers_of,
    layout_of,
    linear_shapes,
    original_shapes,
    random_pairs,
    transformer,
    unet,
)
from support.experts import weights
from support.handmade import base_file, peft_adapter
from support.tiny_models import tiny_llama
from support.written import adapter_of, low_rank

LAYER = "base_model.model.model.layers.0"


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return experts.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("names", ["transformers4", "transformers5", "vllm", "sglang"])
def test_an_adapter_with_other_names_merges_to_the_same(saved: Mapping[str, Path], tmp_path: Path, names: str) -> None:
    lora_export.convert(saved["adapter"], tmp_path / "out", to="peft", names=names, base=saved["old"])
    for spelling in ("old", "new"):
        lora_export.merge(saved[spelling], tmp_path / "out", tmp_path / spelling)
        expected = weights(saved[f"merged_{spelling}"])
        found = weights(tmp_path / spelling)
        assert {name: found[name].shape for name in found} == {name: expected[name].shape for name in expected}
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-6)


def test_the_names_are_those_that_were_asked_for(tmp_path: Path) -> None:
    saved = experts.save(tmp_path / "models", "mixtral")

    def keys(names: str) -> set[str]:
        lora_export.convert(saved["adapter"], tmp_path / names, to="peft", names=names, base=saved["old"])
        return set(load_file(tmp_path / names / "adapter_model.safetensors"))

    assert f"{LAYER}.block_sparse_moe.experts.3.w1.lora_A.weight" in keys("vllm")
    assert keys("transformers4") == set(load_file(tmp_path / "vllm/adapter_model.safetensors"))
    stacked = load_file(tmp_path / "sglang/adapter_model.safetensors") if keys("sglang") else {}
    assert stacked[f"{LAYER}.block_sparse_moe.experts.w1.lora_B.weight"].shape == (experts.COUNT, 24, experts.RANK)
    assert f"{LAYER}.mlp.experts.base_layer.lora_A.weight" in keys("transformers5")
    # And from the old names to the new ones again
    again = lora_export.convert(
        tmp_path / "vllm", tmp_path / "again", to="peft", names="transformers5", base=saved["old"]
    )
    found = load_file(again.output / "adapter_model.safetensors")
    first = load_file(tmp_path / "transformers5/adapter_model.safetensors")
    assert set(found) == set(first)
    assert all(np.array_equal(found[key], first[key]) for key in found)


PEFT_DROPS = "PEFT loads an adapter with other names without its experts, in silence. base="


IN_SGLANG = {"to": "peft", "names": "sglang"}


@pytest.mark.parametrize(
    ("name", "form", "renamed"),
    [
        ("mixtral", {"to": "mlx"}, True),
        ("qwen3_moe", {"to": "mlx"}, False),
        ("mixtral", IN_SGLANG, False),
        ("qwen3_moe", IN_SGLANG, True),
    ],
)
def test_stacked_experts_get_names_that_peft_finds(
    tmp_path: Path, name: str, form: dict[str, Any], renamed: bool
) -> None:
    """mlx-lm calls w1 of Mixtral gate_proj, which is the name of no layer. SGLang calls all of them w1."""
    saved = experts.save(tmp_path / "models", name)
    lora_export.convert(saved["adapter"], tmp_path / "stacked", base=saved["old"], **form)
    found = lora_export.convert(tmp_path / "stacked", tmp_path / "peft", to="peft", base=saved["old"])
    assert PEFT_DROPS not in str(found.notes) and peft_finds_experts(saved["old"], found.output)
    lora_export.merge(saved["old"], tmp_path / "peft", tmp_path / "out")
    found, expected = weights(tmp_path / "out"), weights(saved["merged_old"])
    assert all(np.allclose(found[key], expected[key], rtol=0, atol=2e-7) for key in expected)
    keys = load_file(tmp_path / "peft/adapter_model.safetensors").keys()
    assert any("mlp.experts.base_layer.lora_A" in key for key in keys) == renamed
    without = lora_export.convert(tmp_path / "stacked", tmp_path / "without", to="peft")
    assert PEFT_DROPS in str(without.notes) and peft_finds_experts(saved["old"], without.output) != renamed
    own = load_file(tmp_path / "without/adapter_model.safetensors").keys()
    assert (own == keys) != renamed
    for base in (saved["new"], as_mlx(saved["old"], tmp_path / "as_mlx"), only_config(saved["old"], tmp_path / "bare")):
        written = lora_export.convert(tmp_path / "stacked", tmp_path / f"of_{base.name}", to="peft", base=base)
        assert load_file(written.output / "adapter_model.safetensors").keys() == own, base
        assert PEFT_DROPS in str(written.notes)


def test_peft_joins_experts_of_rslora_at_their_scale(tmp_path: Path) -> None:
    """It doubles rank and alpha of gate and up, which have to be joined: their scale by the root would change."""
    saved = experts.save(tmp_path / "models", "qwen3_moe", use_rslora=True)
    found = lora_export.convert(saved["adapter"], tmp_path / "out", to="peft", names="transformers4", base=saved["old"])
    model = AutoModelForCausalLM.from_pretrained(saved["old"])
    merged = peft.PeftModel.from_pretrained(model, found.output).merge_and_unload()
    expected = AutoModelForCausalLM.from_pretrained(saved["merged_old"]).state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[key])


def peft_finds_experts(base: Path, adapter: Path) -> bool:
    """Whether PEFT changes the experts of the model by this adapter."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items() if "experts" in name}
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return all(not torch.equal(merged[name], value) for name, value in before.items())


def only_config(base: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    return folder


def as_mlx(base: Path, folder: Path) -> Path:
    """A checkpoint with its experts as mlx-lm stores them: stacked, and under names of its own."""
    tensors, stacks = weights(base), defaultdict[str, list[np.ndarray[Any, Any]]](list)
    of_mixtral = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for key in sorted(key for key in tensors if ".experts." in key):
        layer, _, _, projection, _ = key.rsplit(".", 4)
        stacks[f"{layer}.switch_mlp.{of_mixtral.get(projection, projection)}.weight"].append(tensors.pop(key))
    folder = only_config(base, folder)
    save_file(tensors | {key: np.stack(parts) for key, parts in stacks.items()}, folder / "model.safetensors")
    return folder


def test_a_base_that_has_not_the_names_is_refused(tmp_path: Path) -> None:
    saved = experts.save(tmp_path / "models", "mixtral")
    with pytest.raises(InputRefused, match='names="vllm" needs those of the original checkpoint'):
        lora_export.convert(saved["adapter"], tmp_path / "out", to="peft", names="vllm", base=saved["new"])
    other = peft_adapter(tmp_path / "other", {"elsewhere": ([[1.0]], [[1.0]])})
    with pytest.raises(MatchError, match="elsewhere"):
        lora_export.convert(other, tmp_path / "out", to="peft", names="vllm", base=saved["old"])
    base_file(tmp_path / "bare.safetensors", {"fc.weight": [[1.0, 2.0]]})
    fitting = peft_adapter(tmp_path / "fitting", {"fc": ([[1.0, 2.0]], [[1.0]])})
    with pytest.raises(InputRefused, match=r"has no config\.json with a model_type"):
        lora_export.convert(fitting, tmp_path / "out", to="peft", names="vllm", base=tmp_path / "bare.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["mlx", "openvino"])
def test_a_base_that_transformers_stores_as_it_loads_it_has_the_names(tmp_path: Path, to: Any) -> None:
    """It removes `vision_model.` from the names of CLIP's image tower, and does not put it back."""
    module = "encoder.layers.0.self_attn.q_proj"
    given = peft_adapter(tmp_path / "adapter", {module: ([[1.0, 2.0]], [[1.0]])})
    bases = {}
    for name, model_type in (("CLIPVisionModel", "clip_vision_model"), ("LlavaForConditionalGeneration", "llava")):
        bases[name] = tmp_path / name
        bases[name].mkdir()
        base_file(bases[name] / "model.safetensors", {f"{module}.weight": [[1.0, 2.0]]})
        config = {"model_type": model_type, "architectures": [name]}
        (bases[name] / "config.json").write_text(json.dumps(config))
    clip, llava = bases.values()
    written = lora_export.convert(given, tmp_path / "out", to=to, base=clip).output
    assert [*lora_export.load_adapter(written).pairs] == [module]
    with pytest.raises(InputRefused, match="this format needs those of the original checkpoint"):
        lora_export.convert(given, tmp_path / "no", to=to, base=llava)
    with pytest.raises(InputRefused, match='names="transformers4" needs those of the original checkpoint'):
        lora_export.convert(given, tmp_path / "no", to="peft", names="transformers4", base=clip)


def test_an_expert_that_is_stored_transposed_has_a_transposed_pair() -> None:
    spec = TensorSpec("moe.up.weight[1]", (4, 3), "float32", Layout.IN_OUT)
    pair = low_rank(3, 4, 2)
    name, placed = _placed("moe.up.weight[1]", pair, BaseTensors([]), {spec.name: spec})
    assert (name, placed.as_stored) == ("moe.up[1]", True)
    np.testing.assert_array_equal(placed.delta(), pair.delta().T)
    name, placed = _placed("moe.up.weight[1]", pair, BaseTensors([]), {})
    np.testing.assert_array_equal(placed.delta(), pair.delta())


RENAMED = {
    "Qwen2VLForConditionalGeneration": (
        "qwen2_vl",
        {
            "model.layers.0.self_attn.q_proj": "model.language_model.layers.0.self_attn.q_proj",
            "visual.blocks.0.attn.qkv": "model.visual.blocks.0.attn.qkv",
        },
    ),
    "LlavaForConditionalGeneration": (
        "llava",
        {
            "language_model.model.layers.0.self_attn.q_proj": "model.language_model.layers.0.self_attn.q_proj",
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1": "model.vision_tower.encoder.layers.0.mlp.fc1",
        },
    ),
    "ViTForImageClassification": (
        "vit",
        {
            "vit.encoder.layer.0.attention.attention.query": "vit.layers.0.attention.q_proj",
            "vit.encoder.layer.0.attention.output.dense": "vit.layers.0.attention.o_proj",
        },
    ),
}


@pytest.mark.parametrize("architecture", RENAMED)
def test_renamed_modules_get_either_generation_of_names(tmp_path: Path, architecture: str) -> None:
    model_type, names = RENAMED[architecture]
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", {f"{name}.weight": np.ones((3, 4)) for name in names})
    config = {"model_type": model_type, "architectures": [architecture]}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    pairs = {name: low_rank(3, 4, 2, seed=number) for number, name in enumerate(names)}
    for source in (pairs, {names[name]: pair for name, pair in pairs.items()}):
        for wanted in ("vllm", "transformers5"):
            options = {"to": "peft", "names": wanted, "base": tmp_path / "base", "overwrite": True}
            back = lora_export.load_adapter(
                lora_export.convert(adapter_of(source), tmp_path / wanted, **options).output
            )
            expected = {names[name] if wanted == "transformers5" else name: pair for name, pair in pairs.items()}
            assert sorted(back.pairs) == sorted(expected)
            assert all(np.array_equal(back.pairs[name].delta(), pair.delta()) for name, pair in expected.items())


@pytest.mark.parametrize("names", ["vllm", "transformers5"])
def test_a_head_that_the_base_ties_has_a_pair_too(tmp_path: Path, names: str) -> None:
    tables = {"model.embed_tokens.weight": np.ones((5, 4)), "model.layers.0.self_attn.q_proj.weight": np.ones((4, 4))}
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", tables)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    adapter = adapter_of({"lm_head": low_rank(5, 4, 2)})
    done = lora_export.convert(adapter, tmp_path / "to", to="peft", names=names, base=tmp_path / "base")
    assert list(lora_export.load_adapter(done.output).pairs) == ["lm_head"]
    with pytest.raises(MatchError, match="the base has no weight for lm_head"):  # nor has mlx-lm
        lora_export.convert(adapter, tmp_path / "mlx", to="mlx", base=tmp_path / "base")


@pytest.mark.parametrize(
    "kind", ["language model", "with kernels", "with kernels and dots", "unet", "unet with kernels", "file"]
)
def test_peft_loads_what_gets_dots_and_kernels_of_the_base(kind, tmp_path):
    model = unet() if kind in ("unet", "unet with kernels", "file") else tiny_llama()
    base = folder_of(model, tmp_path / "base")
    if kind == "file":
        (base / "config.json").unlink()
        (base,) = base.glob("*.safetensors")
    shapes = {name: shape for name, shape in linear_shapes(model).items() if name.endswith(("_proj", "to_q"))}
    pairs = random_pairs(shapes)
    stored = {name: tuple(each[..., None, None] for each in pair) for name, pair in pairs.items()}
    stored = stored if "kernels" in kind else pairs
    given = adapter_file(tmp_path / "a.safetensors", stored, prefix="lycoris_", flattened=True, alpha=1)
    if "dots" in kind:
        given = adapter_of({name: LoraPair(*pair, scale=0.5) for name, pair in stored.items()})
    written = lora_export.convert(given, tmp_path / "out", to="peft", base=base).output
    before = {name: value.copy() for name, value in arrays_of(model).items()}
    model = copy.deepcopy(model)
    merged = peft.PeftModel.from_pretrained(model, written).merge_and_unload()
    after = arrays_of(merged)
    assert {name: np.abs(after[f"{name}.weight"] - before[f"{name}.weight"] - change(pair, 0.5)).max()
            for name, pair in pairs.items()} == pytest.approx(dict.fromkeys(pairs, 0), abs=1e-5)  # fmt: skip


@pytest.mark.parametrize("kernel", [(), (1, 1)])
def test_pairs_that_do_not_fit_the_base_keep_their_kernels(kernel, tmp_path):
    base = base_file(tmp_path / "base.safetensors", {"linear.weight": np.ones((6, 4))})
    shapes = {"linear": (1, 1), "other": kernel}
    pairs = {name: (np.ones((2, 4, *kernel)), np.ones((6, 2, *kernel))) for name, kernel in shapes.items()}
    given = peft_adapter(tmp_path / "given", pairs, {"other.bias": np.ones(6, np.float32)}, layout="")
    found = lora_export.load_adapter(lora_export.convert(given, tmp_path / "out", to="peft", base=base).output)
    assert {name: pair.shape for name, pair in found.pairs.items()} == {"linear": (6, 4), "other": (6, 4, *kernel)}


# --- Adapters of diffusion models under other names: diffusers', and those of the models' authors. ---


LAYERS = {"mid_block.attentions.0.proj_in": (64, 64, 1, 1), "up_blocks.0.resnets.1.conv1": (64, 96, 3, 3)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    folder_of(unet(), folder / "unet")
    folder_of(clip_text_model(), folder / "text_encoder")
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def kohya(folder: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]]):
    return formats.load(adapter_file(folder / "a.safetensors", pairs, prefix="lora_", flattened=True, alpha=1))


def test_flattened_names_get_their_dots_in_each_model(pipeline, tmp_path):
    pairs = random_pairs(
        {
            **{f"unet.{name}": shape for name, shape in LAYERS.items()},
            "te.text_model.encoder.layers.0.mlp.fc1": (37, 32),
        }
    )
    named = named_for_pipeline(kohya(tmp_path, pairs), pipeline, "diffusers")
    assert set(named.pairs) == {
        *(f"denoiser/{name}" for name in LAYERS),
        "text_encoder/text_model.encoder.layers.0.mlp.fc1",
    }
    assert not named.flattened and named.spelled("denoiser/up_blocks.0.resnets.1.conv1").startswith(
        "lora_unet_up_blocks_0"
    )
    own = named.pairs["denoiser/mid_block.attentions.0.proj_in"]
    assert np.array_equal(own.a, pairs["unet.mid_block.attentions.0.proj_in"][0]) and own.scale == 0.5


@pytest.mark.parametrize("has_dots", [True, False])
@pytest.mark.parametrize(
    ("to", "part"), [("peft", "unet"), ("diffusers", "unet"), ("diffusers", "."), ("kohya", "unet"), ("kohya", ".")]
)
def test_pairs_made_of_flat_ones_get_the_kernels_of_the_base(to, part, has_dots, pipeline, tmp_path):
    component = "" if to == "peft" else "denoiser/"
    pairs = {}
    for name, (out, *inputs) in LAYERS.items():
        a, b = np.ones((1, math.prod(inputs)), np.float32), np.arange(1, out + 1, dtype=np.float32)[:, None]
        pairs[component + name] = HadamardPair({"a1": a, "b1": b, "a2": a, "b2": b}, 1.0)
    base, given = pipeline / part, adapter_of(pairs)
    if not has_dots:
        given = given.renamed(lambda name: name.replace(".", "_"), flattened=True)
    written = lora_export.convert(given, tmp_path / "out", to=to, base=base, as_kind="lora", rank=1).output
    found = formats.load(written).pairs.values()
    assert sorted((pair.a.shape, pair.b.shape) for pair in found) == [
        ((1, 64, 1, 1), (64, 1, 1, 1)),
        ((1, 96, 3, 3), (64, 1, 1, 1)),
    ]
    assert all(np.array_equal(pair.delta()[:, 0, 0, 0], np.arange(1, 65) ** 2) for pair in found)


def test_flat_pairs_need_no_weights_of_the_base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    row, column = np.ones((1, 4), np.float32), np.ones((6, 1), np.float32)
    given = adapter_of({"fc": HadamardPair({"a1": row, "b1": column, "a2": row, "b2": column}, 1.0)})
    how = {"to": "peft", "as_kind": "lora", "rank": 1}
    written = lora_export.convert(given, tmp_path / "out", base=tmp_path / "base", **how).output
    assert formats.load(written).pairs["fc"].shape == (6, 4)


def test_the_names_of_the_authors_are_those_of_the_original_model(pipeline, tmp_path):
    adapter = kohya(tmp_path, random_pairs({f"unet.{name}": shape for name, shape in LAYERS.items()}))
    named = named_for_pipeline(adapter, pipeline / "unet", "comfyui")
    assert set(named.pairs) == {"denoiser/middle_block.1.proj_in", "denoiser/output_blocks.1.0.in_layers.2"}


@pytest.mark.parametrize(
    ("family", "module", "shape", "original"),
    [
        ("Flux", "transformer_blocks.0.ff.net.2", (32, 128), "double_blocks.0.img_mlp.2"),
        ("Flux 2", "transformer_blocks.0.ff.linear_out", (32, 96), "double_blocks.0.img_mlp.2"),
        ("Stable Diffusion 3", "transformer_blocks.1.attn.to_out.0", (32, 32), "joint_blocks.1.x_block.attn.proj"),
        ("Wan", "blocks.1.attn2.add_k_proj", (24, 24), "blocks.1.cross_attn.k_img"),
        ("HunyuanVideo", "transformer_blocks.0.ff.net.2", (20, 80), "double_blocks.0.img_mlp.fc2"),
        ("Z-Image", "layers.0.attention.to_out.0", (32, 32), "layers.0.attention.out"),
        ("Wan-VACE", "vace_blocks.1.proj_out", (24, 24), "vace_blocks.1.after_proj"),
        ("Chroma", "transformer_blocks.0.attn.to_add_out", (32, 32), "double_blocks.0.txt_attn.proj"),
        ("Lumina 2", "context_refiner.0.feed_forward.linear_2", (24, 96), "context_refiner.0.feed_forward.w2"),
        ("Mochi", "transformer_blocks.47.norm1_context.linear_1", (8, 12), "blocks.47.mod_y"),
        ("Mochi", "transformer_blocks.0.norm1_context.linear", (32, 12), "blocks.0.mod_y"),
        ("AuraFlow", "joint_transformer_blocks.0.attn.to_add_out", (16, 16), "double_layers.0.attn.w1o"),
        ("Sana", "transformer_blocks.1.ff.conv_point", (16, 40, 1, 1), "blocks.1.mlp.point_conv.conv"),
        ("LTX-Video", "time_embed.linear", (96, 16), "adaln_single.linear"),
        ("Qwen-Image", "transformer_blocks.0.attn.to_add_out", (32, 32), "transformer_blocks.0.attn.to_add_out"),
    ],
)  # fmt: skip
def test_each_family_has_the_names_of_its_own_authors(family, module, shape, original, tmp_path):
    base = folder_of(transformer(family), tmp_path / "base")
    path = adapter_file(tmp_path / "a.safetensors", random_pairs({module: shape}), prefix="transformer.")
    assert list(named_for_pipeline(formats.load(path), base, "comfyui").pairs) == [f"denoiser/{original}"]


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_names_of_authors_that_are_not_known_are_refused(to, tmp_path):
    """CogView 4: a file with the names of diffusers would be read by nobody."""
    sizes = {"in_channels": 4, "out_channels": 4, "attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 1}
    model = CogView4Transformer2DModel(**sizes, text_embed_dim=8, time_embed_dim=8, condition_dim=4, sample_size=4)
    base, module = folder_of(model, tmp_path / "base"), "transformer_blocks.0.attn1.to_q"
    path = adapter_file(tmp_path / "a.safetensors", random_pairs({module: (16, 16)}), prefix="transformer.")
    with pytest.raises(
        InputRefused, match=r'authors of CogView4Transformer2DModel call its layers is not known.*to="diffusers"'
    ):
        named_for_pipeline(formats.load(path), base, to)


# Modules of Flux whose weights are parts of one weight of its authors, and their numbers of outputs there.
FUSED = {
    "double_blocks.0.img_attn.qkv": {f"transformer_blocks.0.attn.to_{part}": 32 for part in "qkv"},
    "single_blocks.0.linear1": {
        **{f"single_transformer_blocks.0.attn.to_{part}": 32 for part in "qkv"},
        "single_transformer_blocks.0.proj_mlp": 128,
    },
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return folder_of(transformer("Flux"), tmp_path_factory.mktemp("base") / "flux")


def named_as_flux(pairs: dict[str, LoraPair], flux: Path, **fields: object) -> Adapter:
    adapter = adapter_of({f"denoiser/{name}": pair for name, pair in pairs.items()}, **fields)
    return named_for_pipeline(adapter, flux, "comfyui")


@pytest.mark.parametrize("kernel", [(), (1, 1)])
@pytest.mark.parametrize("new", FUSED)
def test_the_parts_of_one_weight_of_the_authors_become_one_pair(new, kernel, flux):
    parts = {name: low_rank(size, 32, rank) for rank, (name, size) in enumerate(FUSED[new].items(), 1)}
    named = named_as_flux({name: part.with_kernel(kernel) for name, part in parts.items()}, flux)
    (pair,) = (named.pairs[name] for name in [f"denoiser/{new}"])
    assert list(named.pairs) == [f"denoiser/{new}"] and pair.rank == sum(range(1, len(parts) + 1))
    assert pair.delta() == pytest.approx(np.concatenate([part.delta() for part in parts.values()]), abs=1e-5)
    some = dict(list(parts.items())[1:])
    (pair,) = named_as_flux(some, flux).pairs.values()
    assert pair.delta()[32:] == pytest.approx(np.concatenate([part.delta() for part in some.values()]), abs=1e-5)
    assert not pair.delta()[:32].any()


def test_the_halves_of_a_modulation_are_swapped_with_everything_on_them(flux):
    pair = low_rank(64, 32, 2, magnitude=np.arange(1, 65, dtype=np.float32))
    bias = np.arange(64, dtype=np.float32)
    qkv = {"denoiser/transformer_blocks.0.attn.to_k": np.ones(32, np.float32)}
    named = named_as_flux({"norm_out.linear": pair}, flux, biases={"denoiser/norm_out.linear": bias, **qkv})
    new = "denoiser/final_layer.adaLN_modulation.1"
    order = [*range(32, 64), *range(32)]
    assert np.array_equal(named.pairs[new].delta(), pair.delta()[order])
    assert np.array_equal(named.pairs[new].magnitude, pair.magnitude[order])
    assert named.biases[new].tolist() == bias[order].tolist()
    assert named.biases["denoiser/double_blocks.0.img_attn.qkv"].tolist() == [0] * 32 + [1] * 32 + [0] * 32
    assert named.spelled(new) == "denoiser/norm_out.linear"


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (WholePair({"change": np.ones((32, 32))}, 1.0), "to_q: a part of a weight of the original model, and no pair"),
        (
            low_rank(32, 32, 1, scale=3.0),
            "to_q, .*to_k: parts of one weight of the original model: .* different scales",
        ),
    ],
)
def test_parts_that_make_no_pair_are_refused_by_name(pair, message, flux):
    parts = {"transformer_blocks.0.attn.to_q": pair, "transformer_blocks.0.attn.to_k": low_rank(32, 32, 1)}
    with pytest.raises(InputRefused, match=f"the format comfyui cannot express .*\\s.*{message}"):
        named_as_flux(parts, flux)


# Linear layers of each family that diffusers converts from kohya's names.
IN_BLOCKS = {
    "Flux 2": ("transformer_blocks.", "single_transformer_blocks."),
    "Wan": ("blocks.",),
    "Qwen-Image": ("transformer_blocks.",),
    "Z-Image": ("layers.",),
}


@pytest.mark.parametrize("family", IN_BLOCKS)
def test_diffusers_reads_what_is_written_for_kohyas_scripts(family, tmp_path):
    model = transformer(family)
    shapes = {name: shape for name, shape in linear_shapes(model).items() if name.startswith(IN_BLOCKS[family])}
    pairs = random_pairs(shapes)
    path = adapter_file(tmp_path / "a.safetensors", pairs, prefix="transformer.", alpha=1)
    base = folder_of(model, tmp_path / "base")
    written = lora_export.convert(path, tmp_path / "kohya", to="kohya", base=base).output
    theirs, own = fused_by_diffusers(model, PIPELINES[family], written, "transformer"), arrays_of(model)
    for module, pair in pairs.items():
        assert np.abs(theirs[f"{module}.weight"] - own[f"{module}.weight"] - change(pair, 0.5)).max() < 5e-6


@pytest.mark.parametrize("family", ["Wan-VACE", "Chroma", "Mochi", "AuraFlow", "Sana", "LTX-Video"])
def test_an_adapter_for_comfyui_changes_the_checkpoint_of_the_authors(family, tmp_path):
    """diffusers itself takes the changes of that checkpoint back to its own names."""
    model, wide = transformer(family), ("single_transformer_blocks.0.attn", "single_transformer_blocks.0.proj_mlp")
    shapes = {
        name: shape
        for name, shape in linear_shapes(model).items()
        if not re.match(r"transformer_blocks\.([2-9]|[1-3]\d)", name)
        and not (family == "Chroma" and name.startswith(wide))
    }
    pairs = random_pairs(shapes)
    path = adapter_file(tmp_path / "a.safetensors", pairs, prefix="transformer.", alpha=1)
    base = folder_of(model, tmp_path / "base")
    written = load_file(lora_export.convert(path, tmp_path / "out", to="comfyui", base=base).output)
    stored = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    checkpoint = {name: torch.zeros(shape) for name, shape in original_shapes(layout_of(family), stored).items()}
    checkpoint |= {name: torch.zeros(21504, 1) for name in checkpoint if ".linear1." in name}  # diffusers' own width
    for key in written:
        if key.endswith(".lora_A.weight"):
            change_of = torch.from_numpy(written[key.replace("lora_A", "lora_B")] @ written[key])
            name = key.removeprefix("diffusion_model.").replace(".lora_A.weight", ".weight")
            assert checkpoint[name].shape == change_of.shape, name
            checkpoint[name] = change_of
    found = converted_by_diffusers(family, checkpoint)
    assert {
        name: np.abs(found[f"{name}.weight"].numpy() - change(pair, 0.5)).max() for name, pair in pairs.items()
    } == (pytest.approx(dict.fromkeys(pairs, 0), abs=5e-6))


@pytest.mark.parametrize("like_sdxl", [False, True])
def test_a_unet_has_the_names_of_kohyas_scripts(like_sdxl, tmp_path):
    model = unet(like_sdxl=like_sdxl)
    shapes = {name: shape for name, shape in linear_shapes(model, convolutions=True).items() if "block" in name}
    pairs = random_pairs({f"unet.{name}": shape for name, shape in shapes.items()})
    path = adapter_file(tmp_path / "a.safetensors", pairs, alpha=1)
    written = lora_export.convert(path, tmp_path / "kohya", to="kohya", base=folder_of(model, tmp_path / "base")).output
    assert any(("input_blocks_" in key) == like_sdxl for key in load_file(written))
    pipeline = "StableDiffusionXLPipeline" if like_sdxl else "StableDiffusionPipeline"
    theirs, own = fused_by_diffusers(model, pipeline, written, "unet"), arrays_of(model)
    for module in shapes:
        changed = theirs[f"{module}.weight"] - own[f"{module}.weight"]
        assert np.abs(changed - change(pairs[f"unet.{module}"], 0.5)).max() < 5e-6


@pytest.mark.parametrize(
    ("model", "pipeline", "to", "layers", "sizes"),
    [
        ("FluxTransformer2DModel", "FluxPipeline", "kohya", "blocks.", {"num_layers": 1, "num_single_layers": 1}),
        ("Lumina2Transformer2DModel", "Lumina2Pipeline", "comfyui", "0.", {"num_layers": 1, "num_refiner_layers": 1}),
    ],
)
def test_diffusers_reads_a_model_of_the_published_width(model, pipeline, to, layers, sizes, tmp_path):
    """diffusers has the width of the published model in its code: so has this one, without its weights."""
    build = functools.partial(getattr(diffusers, model), **sizes)
    with torch.device("meta"):
        shapes = {name: shape for name, shape in linear_shapes(build()).items() if layers in name}
    pairs = random_pairs({f"transformer.{name}": shape for name, shape in shapes.items()})
    path = adapter_file(tmp_path / "a.safetensors", pairs, alpha=1)
    base = headers_of(build, tmp_path / "base")
    written = lora_export.convert(path, tmp_path / "written", to=to, base=base).output
    state = getattr(diffusers, pipeline).lora_state_dict(str(written))
    assert {name.rpartition(".lora_")[0] for name in state} == set(pairs)
    for name, (a, b) in pairs.items():
        read = state[f"{name}.lora_B.weight"].numpy()[:8] @ state[f"{name}.lora_A.weight"].numpy()
        assert np.abs(read - change((a, b[:8]), 0.5)).max() < 1e-5


def test_the_family_of_a_base(pipeline, flux, tmp_path):
    assert family_of_base(pipeline) is Family.UNKNOWN  # its index has no class
    assert [family_of_base(base) for base in (pipeline / "unet", flux)] == [Family.SD, Family.FLUX]


def test_a_base_that_does_not_fit_is_refused(pipeline, tmp_path):
    adapter = kohya(tmp_path, random_pairs({"unet.no": (4, 4)}))
    with pytest.raises(MatchError, match="lora_unet_no"):
        named_for_pipeline(adapter, pipeline, "diffusers")
    both = kohya(tmp_path, random_pairs({"unet.no": (4, 4), "te.no": (4, 4)}))
    with pytest.raises(InputRefused, match="is one model, and the adapter changes several\\. Give the folder of the"):
        named_for_pipeline(both, pipeline / "unet", "diffusers")
