"""The names of stored tensors in the loaded model, against those of the model itself."""

from __future__ import annotations

import json

import pytest
import transformers
from transformers.core_model_loading import revert_weight_conversion

from lora_export.names import table
from lora_export.names.architecture import rules_of
from lora_export.names.loaded_names import LoadedNames
from lora_export.names.tensor_parts import NotExpressible
from support import transformers_names

SAMPLE = (
    *("ViTForImageClassification", "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    *("MixtralForCausalLM", "PaliGemmaForConditionalGeneration", "JinaEmbeddingsV3Model", "BertModel"),
)
# Loading adds or removes the name of the inner model, where only the model itself tells that this is needed.
UNLIKE = {
    *("DeepseekV4ForCausalLM", "MiniMaxM3VLModel", "PaddleOCRVLModel", "RfDetrForInstanceSegmentation"),
    *("RfDetrForObjectDetection", "ShieldGemma2ForImageClassification", "Step3p7Model"),
}

pytestmark = pytest.mark.skipif(
    transformers.__version__ != table.read_table().version, reason="the table is that of another transformers"
)


def names_and_shapes(cls: type) -> tuple[LoadedNames, dict, dict]:
    """What is found for the names that a model is saved under, the saved tensors, and those of the model."""
    config = cls.config_class()
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        for name, size in {"num_hidden_layers": 2, "num_local_experts": 4}.items():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, size)
    model = transformers_names.build(cls, config)
    own = model.state_dict()
    saved = revert_weight_conversion(model, dict(own))
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [cls.__name__]}
    rules = rules_of(config)
    assert rules is not None
    return LoadedNames(rules, saved), saved, own


@pytest.mark.parametrize("name", SAMPLE)
def test_saved_names_are_mapped_one_to_one_onto_the_models(name):
    loaded, saved, own = names_and_shapes(getattr(transformers, name))
    assert set(loaded) == set(own) and not loaded.ambiguous
    assert (set(saved) == set(own)) is (name == "BertModel")
    assert {source for tensor in loaded.values() for source in tensor.sources} == set(saved)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "JinaEmbeddingsV3Model"])
def test_converted_tensors_have_the_shapes_of_the_model(name):
    loaded, saved, own = names_and_shapes(getattr(transformers, name))
    converted = [tensor for tensor in loaded.values() if tensor.conversion is not None]
    assert len(converted) >= 4
    for tensor in converted:
        found = tensor.conversion.assembled(lambda stored: tuple(saved[stored].shape))
        assert found[tensor.name].shape == tuple(own[tensor.name].shape)


@pytest.mark.slow  # builds every model of transformers without memory
def test_saved_names_of_every_class():
    wrong, renamed = set(), 0
    for cls in transformers_names.model_classes():
        if cls.__name__ in table.read_table().unbuilt:
            continue
        try:
            loaded, saved, own = names_and_shapes(cls)
        except Exception:  # noqa: BLE001  two layers are too few for some classes; others have no type
            continue
        renamed += set(saved) != set(own)
        if set(loaded) != set(own):
            wrong.add(cls.__name__)
            continue
        for tensor in loaded.values():
            if tensor.conversion is not None:
                try:
                    found = tensor.conversion.assembled(lambda stored, saved=saved: tuple(saved[stored].shape))
                except NotExpressible:
                    continue
                assert found[tensor.name].shape == tuple(own[tensor.name].shape), tensor.name
    assert wrong <= UNLIKE and renamed > 300


def test_a_name_that_two_tensors_would_get_is_left_out():
    rules = rules_of({"model_type": "vit", "architectures": ["ViTModel"]})
    loaded = LoadedNames(rules, ["encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight", "x"])
    assert loaded.ambiguous == {"layers.0.layernorm_before.weight"} and list(loaded) == ["x"]


def test_a_stored_tensor_leads_to_every_tensor_made_of_it():
    rules = rules_of({"model_type": "nomic_bert", "architectures": ["NomicBertModel"]})
    loaded = LoadedNames(rules, ["encoder.layers.0.attn.Wqkv.weight"])
    found = [tensor.name for tensor in loaded.by_stored["encoder.layers.0.attn.Wqkv.weight"]]
    assert found == [f"layers.0.self_attn.{each}_proj.weight" for each in "qkv"]
    assert "Chunk" in str(loaded[found[0]].conversion)
