"""Models are exported without their cache, and are afterwards as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.models import export
from lora_export.models.load import load_model
from lora_export.models.outputs import named_outputs
from lora_export.models.tracing import cache_setting, disable_cache
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from support.small_models import small_model

pytestmark = pytest.mark.exports
transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def encoder_decoder() -> Any:
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**TEXT), transformers.BertConfig(**TEXT)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


@pytest.mark.slow
@pytest.mark.parametrize("build", [qwen2_vl, encoder_decoder])
def test_a_nested_configs_cache_is_no_output(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    assert model.module(**model.example_inputs()).get("past_key_values") is None
    if model.text_only is not None:  # the exporter refuses the images of Qwen2-VL
        model = model.without_images("this test is about the cache")
    inputs = model.example_inputs()
    graph = export.to_onnx(model.module, inputs, axes=model.axes).graph
    assert [output.name for output in graph.outputs] == list(named_outputs(model.module(**inputs)))


@pytest.mark.slow
def test_a_model_from_a_factory_gets_its_cache_back() -> None:
    torch.manual_seed(0)
    module = qwen2_vl().eval()
    ids = {"input_ids": torch.randint(0, 80, (2, 5))}
    graph = export.to_onnx(module, ids, axes={"input_ids": {0: "batch", 1: "sequence"}}).graph
    assert [output.name for output in graph.outputs] == ["logits"]
    assert module(**ids).past_key_values is not None


def test_every_nested_config_is_restored() -> None:
    module = encoder_decoder()
    assert module.decoder.config.use_cache
    with cache_setting(module, to=False):
        assert not module.decoder.config.use_cache and not module.config.decoder.use_cache
    assert module.decoder.config.use_cache


def test_a_config_is_changed_at_every_depth() -> None:
    config = transformers.Qwen2VLConfig(text_config=dict(TEXT))
    disable_cache(config)
    assert not config.text_config.use_cache
    assert not hasattr(config, "use_cache") or not config.use_cache


def test_hooks_that_a_model_adds_at_a_run_are_not_added_again(tmp_path: Path) -> None:
    """A SegFormer's head gets the hidden states that hooks collect."""
    model = load_model(str(small_model("segformer", tmp_path)))
    inputs = {name: value.numpy() for name, value in model.example_inputs().items()}
    for runner in (ModuleRunner(model.module), Fp64Runner(model.module)):
        first, second = (runner.run(inputs) for _ in range(2))
        assert all((first[name] == value).all() for name, value in second.items())
    assert not [path for path, part in model.module.named_modules() if part._forward_hooks]
