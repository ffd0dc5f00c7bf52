"""Adapters under the names of a checkpoint or of the loaded model: each merges to what the original merges to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_export
from lora_export.api.adapter_names import _placed
from lora_export.errors import InputRefused, MatchError
from lora_export.plan import Layout, TensorSpec
from lora_export.plan.match_names import BaseTensors
from support import experts
from support.experts import weights
from support.handmade import base_file, peft_adapter
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
