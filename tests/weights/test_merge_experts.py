"""LoRA on stacked parameters, merged into checkpoints of both spellings, beside PEFT's merge of the loaded model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lora_export
from lora_export.errors import InputRefused, MatchError
from lora_export.options.reading import ReadOptions
from support import experts
from support.experts import COUNT, MODELS, PROJECTIONS, RANK, of_single_experts, parts_of, rewritten, weights

LAYER = "base_model.model.model.layers.0.mlp.experts"


@pytest.fixture(scope="module", params=sorted(MODELS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return experts.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return experts.save(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return experts.save(tmp_path_factory.mktemp("gpt_oss"), "gpt_oss")


def merged(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    lora_export.merge(base, adapter, output, **options)
    return weights(output)


def assert_equal(found: Mapping[str, np.ndarray[Any, Any]], expected: Mapping[str, np.ndarray[Any, Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_a_merge_equals_that_of_peft(saved, tmp_path, spelling):
    found = merged(saved[spelling], saved["adapter"], tmp_path / "out")
    assert_equal(found, weights(saved[f"merged_{spelling}"]))
    base = weights(saved[spelling])
    changed = {name for name, value in base.items() if not np.array_equal(value, found[name])}
    assert {name for name in base if "experts" in name and "bias" not in name and "shared" not in name} < changed or {
        name for name in base if "linear.weight" in name
    } < changed  # Granite's experts
    audit = lora_export.verify(tmp_path / "out", base=saved[spelling], adapters=saved["adapter"])
    assert audit.verdict.outcome == "same"


@pytest.mark.parametrize("family", sorted(experts.ALL_LINEAR))
def test_what_peft_targets_by_default_is_merged(family, tmp_path):
    """`all-linear` names experts by bare endings, and the router by its module: each pair has one of them."""
    name = family.split()[0]
    config = getattr(transformers, f"{name}Config")(**{**experts.SIZES, **experts.ALL_LINEAR[family]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, options).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"]
    assert sorted(targets) == ["down_proj", "gate.weight", "gate_up_proj"]
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = wrapped(input_ids=ids, use_cache=False).logits
        lora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        found = type(model).from_pretrained(tmp_path / "out").eval()(input_ids=ids, use_cache=False).logits
    assert float((found - expected).norm()) < 5e-6 * float(expected.norm())


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("width", [12, 8, 16])  # with 8 gate_up_proj is square, with 16 down_proj
def test_experts_that_are_transposed_where_their_shape_is_not_the_models(width, is_transposed, tmp_path):
    """Qwen3-VL-MoE was published with (experts, in, out), and is saved as (experts, out, in) today."""
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 16}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = experts.SIZES | {"num_experts": COUNT, "moe_intermediate_size": width, "rope_parameters": rope}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    )
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    if is_transposed:
        file = tmp_path / "base" / "model.safetensors"
        save_file(
            {
                name: value.transpose(1, 2).contiguous()
                if value.ndim == 3 and value.shape[1] != value.shape[2]
                else value
                for name, value in load_file(file).items()
            },
            file,
            metadata={"format": "pt"},
        )
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    options = peft.LoraConfig(r=RANK, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, options).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    lora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        found = type(model).from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
    assert float((found - expected).norm()) < 5e-6 * float(expected.norm())
    assert lora_export.verify(tmp_path / "out", base=tmp_path / "base", adapters=tmp_path / "adapter")


def test_an_adapter_of_single_experts_merges_into_both_spellings(mixtral, tmp_path):
    adapter = of_single_experts(mixtral["adapter"], tmp_path / "adapter")
    for spelling in ("old", "new"):
        found = merged(mixtral[spelling], adapter, tmp_path / spelling)
        assert_equal(found, weights(mixtral[f"merged_{spelling}"]))


@pytest.mark.parametrize(
    "kept", [("2.w1", "2.w2", "2.w3"), ("0.w1", "1.w1", "2.w1", "3.w1"), ("1.w3",), ("3.w2", "0.w3")], ids="+".join
)
def test_experts_that_an_adapter_lacks_stay_in_a_stack(mixtral, tmp_path, kept):
    adapter = of_single_experts(mixtral["adapter"], tmp_path / "adapter", kept)
    before, after = weights(mixtral["old"]), weights(mixtral["merged_old"])
    moe = "model.layers.0.block_sparse_moe.experts"
    mixed = {name: before[name] if moe in name else value for name, value in after.items()}
    mixed |= {f"{moe}.{name}.weight": after[f"{moe}.{name}.weight"] for name in kept}
    assert_equal(merged(mixtral["old"], adapter, tmp_path / "old"), mixed)
    found = merged(mixtral["new"], adapter, tmp_path / "new")
    for parameter, names in PROJECTIONS.items():
        stacked = np.stack(
            [np.concatenate([mixed[f"{moe}.{expert}.{name}.weight"] for name in names]) for expert in range(COUNT)]
        )
        np.testing.assert_allclose(found[f"model.layers.0.mlp.experts.{parameter}"], stacked, rtol=0, atol=2e-7)
    assert lora_export.verify(tmp_path / "new", base=mixtral["new"], adapters=adapter)


def test_an_adapter_of_an_older_peft_has_its_axes_swapped(mixtral, tmp_path):
    """PEFT 0.18: A (experts * rank, out), B (in, experts * rank), and the product is transposed."""

    def swapped(tensors: dict[str, Any]) -> dict[str, Any]:
        found = dict(tensors)
        for parameter, (a, b) in parts_of(tensors, LAYER).items():
            owner = f"{LAYER}{'.base_layer' if parameter == 'gate_up_proj' else ''}"
            found[f"{owner}.lora_A.weight"] = np.moveaxis(b, 2, 1).reshape(COUNT * RANK, -1).copy()
            found[f"{owner}.lora_B.weight"] = np.moveaxis(a, 0, 2).transpose(1, 0, 2).reshape(-1, RANK * COUNT).copy()
        return found

    adapter = rewritten(mixtral["adapter"], tmp_path / "adapter", swapped, peft_version="0.18.0")
    found = merged(mixtral["old"], adapter, tmp_path / "out")
    assert_equal(found, weights(mixtral["merged_old"]))


def grouped(tensors: dict[str, Any]) -> dict[str, Any]:
    """B ordered by expert first, as Unsloth wrote it before 2026.9.6."""
    found = dict(tensors)
    for parameter, (_, b) in parts_of(tensors, LAYER).items():
        owner = f"{LAYER}{'.base_layer' if parameter == 'gate_up_proj' else ''}"
        found[f"{owner}.lora_B.weight"] = np.moveaxis(b, 0, 1).reshape(-1, COUNT * RANK).copy()
    return found


UNSLOTH = {"unsloth_fixed": True, "parent_library": "transformers.models.mixtral.modeling_mixtral"}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"lora_B_layout": "grouped_by_expert"}, {}),
        ({"auto_mapping": UNSLOTH}, {"reading": ReadOptions(moe_b_layout="grouped_by_expert")}),
        ({}, {"reading": ReadOptions(moe_b_layout="grouped_by_expert")}),
    ],
)
def test_columns_of_b_that_are_grouped_by_expert(mixtral, tmp_path, config, options):
    adapter = rewritten(mixtral["adapter"], tmp_path / "adapter", grouped, **config)
    found = merged(mixtral["old"], adapter, tmp_path / "out", **options)
    assert_equal(found, weights(mixtral["merged_old"]))


def test_an_order_that_the_file_does_not_record_is_asked_for(mixtral, tmp_path):
    adapter = rewritten(mixtral["adapter"], tmp_path / "adapter", grouped, auto_mapping=UNSLOTH)
    with pytest.raises(InputRefused, match='moe_b_layout="grouped_by_expert" or moe_b_layout="rank_major"'):
        lora_export.merge(mixtral["old"], adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def stacked(tensors: dict[str, Any]) -> dict[str, Any]:
    """Megatron-Bridge: A (experts, rank, in) and B (experts, out, rank) under the name of the parameter."""
    found = {key: value for key, value in tensors.items() if "experts" not in key}
    for parameter, (a, b) in parts_of(tensors, LAYER).items():
        found |= {f"{LAYER}.{parameter}.lora_A.weight": a.copy(), f"{LAYER}.{parameter}.lora_B.weight": b.copy()}
    return found


def test_stacked_factors_merge_as_flat_ones(mixtral, gpt_oss, tmp_path):
    for name, model in (("mixtral", mixtral), ("gpt_oss", gpt_oss)):
        adapter = rewritten(model["adapter"], tmp_path / f"{name} adapter", stacked, target_parameters=None)
        found = merged(model["old"], adapter, tmp_path / name)
        assert_equal(found, weights(model["merged_old"]))


def test_a_rank_of_stacked_factors_that_the_config_contradicts_is_refused(mixtral, tmp_path):
    adapter = rewritten(mixtral["adapter"], tmp_path / "adapter", stacked, target_parameters=None, r=4)
    with pytest.raises(InputRefused, match="the rank of each expert is 2, the config's is 4, and nothing states which"):
        lora_export.merge(mixtral["old"], adapter, tmp_path / "out")


@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")])
def test_shared_factors_of_single_projections(mixtral, tmp_path, names):
    """SGLang and Tinker: one A for all experts of w1 and w3, one B for all experts of w2. Summed here by hand."""
    rng = np.random.default_rng(0)
    hidden, inner = 16, 24
    shapes = {
        names[0]: ((1, RANK, hidden), (COUNT, inner, RANK)),
        names[1]: ((1, RANK, hidden), (COUNT, inner, RANK)),
        names[2]: ((COUNT, RANK, inner), (1, hidden, RANK)),
    }
    factors = {name: [rng.normal(size=size).astype(np.float32) for size in own] for name, own in shapes.items()}

    def shared(tensors: dict[str, Any]) -> dict[str, Any]:
        owner = "base_model.model.model.layers.0.block_sparse_moe.experts"
        return {
            f"{owner}.{name}.lora_{side}.weight": factor
            for name, pair in factors.items()
            for side, factor in zip("AB", pair, strict=True)
        }

    adapter = rewritten(mixtral["adapter"], tmp_path / "adapter", shared, target_parameters=None, target_modules=[])
    found, base = merged(mixtral["old"], adapter, tmp_path / "out"), weights(mixtral["old"])
    for name, stored in zip(names, ("w1", "w3", "w2"), strict=True):
        a, b = factors[name]
        for expert in range(COUNT):
            weight = f"model.layers.0.block_sparse_moe.experts.{expert}.{stored}.weight"
            change = 3 * b[expert % len(b)].astype(np.float64) @ a[expert % len(a)]
            np.testing.assert_allclose(found[weight], base[weight] + change, atol=1e-6)


def test_an_adapter_of_other_experts_is_refused(mixtral, tmp_path):
    config = experts.tiny_model("mixtral", num_local_experts=3)
    config.save_pretrained(tmp_path / "base")
    with pytest.raises(MatchError, match=r"the adapter was trained on 4 experts, and .*gate_up_proj is \(3, 48, 16\)"):
        lora_export.merge(tmp_path / "base", mixtral["adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_whose_experts_the_adapter_lacks_is_a_misfit(mixtral, tmp_path):
    experts.tiny_model("mixtral", num_hidden_layers=2).save_pretrained(tmp_path / "base")
    with pytest.raises(MatchError) as refused:
        lora_export.merge(tmp_path / "base", mixtral["adapter"], tmp_path / "out")
    assert "model.layers.1.mlp.experts.gate_up_proj: targeted by the adapter's config" in str(refused.value)


def test_square_experts_of_a_bare_file_are_refused(gpt_oss, tmp_path):
    """Without a config nothing tells how a square expert is stored. down_proj alone: gate_up_proj would show it."""

    def down_alone(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in tensors.items() if "base_layer" not in key}

    targets = {"target_parameters": ["experts.down_proj"]}
    adapter = rewritten(gpt_oss["adapter"], tmp_path / "adapter", down_alone, **targets)
    with pytest.raises(InputRefused, match="each expert is a square matrix, and the base has no config"):
        lora_export.merge(gpt_oss["old"] / "model.safetensors", adapter, tmp_path / "out.safetensors")
    found = merged(gpt_oss["old"], adapter, tmp_path / "out")
    expected, name = weights(gpt_oss["merged_old"]), "model.layers.0.mlp.experts.down_proj"
    np.testing.assert_allclose(found[name], expected[name], atol=2e-7)


def test_rank_and_alpha_patterns_of_a_parameter(tmp_path):
    saved = experts.save(
        tmp_path / "saved",
        "qwen3_moe",
        rank_pattern={"gate_up_proj": 4},
        alpha_pattern={"down_proj": 5},
        use_rslora=True,
    )
    found = merged(saved["old"], saved["adapter"], tmp_path / "out")
    assert_equal(found, weights(saved["merged_old"]))


def test_experts_in_mxfp4_take_an_adapter_as_their_floats_do(tmp_path):
    """gpt-oss as it is published: blocks of 32 numbers. The float base is what transformers makes of it."""
    model = experts.tiny_model("gpt_oss", hidden_size=64, intermediate_size=64, head_dim=32)
    experts.peft_model("gpt_oss", model).save_pretrained(tmp_path / "adapter")
    generator = torch.Generator().manual_seed(3)
    packed, floats = {}, {}
    for name, value in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = floats[name] = value.to(torch.bfloat16)
            continue
        count, inputs, outputs = value.shape
        sizes = (count, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*sizes, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, sizes, dtype=torch.uint8, generator=generator)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
    for name, tensors in (("packed", packed), ("floats", floats)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": ["GptOssForCausalLM"]}
        if name == "packed":
            config["quantization_config"] = {"quant_method": "mxfp4"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    lora_export.merge(tmp_path / "packed", tmp_path / "adapter", tmp_path / "one", dequantize=True)
    lora_export.merge(tmp_path / "floats", tmp_path / "adapter", tmp_path / "other")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() == floats.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["model.layers.0.mlp.experts.down_proj"], floats["model.layers.0.mlp.experts.down_proj"])
    assert lora_export.verify(tmp_path / "one", base=tmp_path / "packed", adapters=tmp_path / "adapter")
