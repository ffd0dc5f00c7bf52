"""Models that stay quantised through a merge load in transformers, with the weights that our decoders make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora_export
from lora_export.api import verify_quantised
from support.handmade import peft_adapter
from support.quantised import LLAMA_SIZES, bits_of
from support.quantised_weights import weights_in
from support.slow import slow

PROJECTIONS = ("self_attn.q_proj", "mlp.down_proj")


def float_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES)).bfloat16().save_pretrained(folder)
    return folder


def by_bitsandbytes(**options: Any) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        source = float_llama(folder.with_name("float"))
        scheme = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=scheme, device_map="cpu")
        model.save_pretrained(folder)
        return folder

    return made


def in_float8(folder: Path) -> Path:
    """Every linear layer in e4m3 with a scale for each block of 32 x 32."""
    float_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].float().reshape(rows // 32, 32, columns // 32, 32)
        scales = blocks.abs().amax((1, 3)) / 448
        numbers = (blocks / scales[:, None, :, None]).reshape(rows, columns)
        tensors |= {name: numbers.to(torch.float8_e4m3fn), f"{name.removesuffix('weight')}weight_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stated = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    return with_quantization(folder, stated)


def in_compressed_integers(folder: Path) -> Path:
    """Every linear layer in int4 by groups of 32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    float_llama(folder)
    arguments = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    scheme, stored = QuantizationScheme(targets=["Linear"], weights=arguments), {}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, weight in load_file(folder / "model.safetensors").items():
        own = {"weight": weight}
        if "_proj" in name:
            largest = weight.float().reshape(len(weight), -1, 32).abs().amax(-1)
            own = compressor.compress(own | {"weight_scale": (largest / 7).bfloat16()}, scheme)
        stored |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in own.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    groups = {"group_0": {"targets": ["Linear"], "weights": arguments.model_dump(mode="json")}}
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return with_quantization(folder, {**stated, "quantization_status": "compressed", "ignore": ["lm_head"]})


def with_quantization(folder: Path, stated: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    return folder


def by_library(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The weights that transformers computes with, as floats."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)
    found = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            found[f"{name}.weight"] = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, Linear8bitLt):
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            found[f"{name}.weight"] = functional.int8_vectorwise_dequant(module.weight.data, scales).bfloat16()
        assert not (isinstance(module, torch.nn.Linear) and module.weight.is_meta)
    return {name: tensor for name, tensor in found.items() if name.endswith("weight")}


# The base -> how it is made, and how transformers loads it
SCHEMES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "nf4": (by_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), {}),
    "int8": (by_bitsandbytes(load_in_8bit=True), {}),
    "fp8": (in_float8, {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.bfloat16}),
    "int4": (in_compressed_integers, {"quantization_config": CompressedTensorsConfig(dequantize=True)}),
}


@pytest.fixture(scope="module", params=SCHEMES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    made, options = SCHEMES[request.param]
    return made(tmp_path_factory.mktemp(request.param) / "base"), options


def adapter_on(folder: Path, sizes: dict[str, float]) -> Path:
    """An adapter of layers with these sizes of their changes."""
    rng, pairs = np.random.default_rng(0), {}
    for module, size in sizes.items():
        rows, columns = (64, 128) if "down" in module else (64, 64)
        a = rng.normal(size=(2, columns)).astype(np.float32)
        pairs[f"model.{module}"] = (a, size * rng.normal(size=(rows, 2)).astype(np.float32))
    return peft_adapter(folder, pairs)


def test_model_loads_with_kept_and_promoted_layers(base: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, options = base
    sizes = {"layers.0.self_attn.q_proj": 0.02, "layers.0.mlp.down_proj": 0.02, "layers.1.self_attn.q_proj": 6e-5}
    adapter, out = adapter_on(tmp_path / "adapter", sizes), tmp_path / "merged"
    result = lora_export.merge(folder, [adapter], out, keep_quantised=True)
    assert result.report is not None
    layers = {layer.weight.removeprefix("model.layers."): layer for layer in result.report.layers}
    attention = [f"1.self_attn.{part}_proj.weight" for part in "qkv"]
    assert sorted(name for name, layer in layers.items() if not layer.is_kept) == sorted(attention)
    assert layers["1.self_attn.v_proj.weight"].why == "fused with model.layers.1.self_attn.q_proj.weight"
    assert len(layers) == 5
    assert str(lora_export.verify(out, base=folder, adapters=[adapter])).startswith("same")
    ours, theirs = weights_in(out), by_library(out, **options)
    assert theirs.keys() == ours.keys() | {"lm_head.weight"}
    for name, weight in ours.items():
        assert bits_of(theirs[name]) == bits_of(weight), name
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    excluded = config.get("ignore") or config.get("llm_int8_skip_modules") or config.get("modules_to_not_convert")
    assert {f"model.layers.{name.removesuffix('.weight')}" for name in attention} | {"lm_head"} <= set(excluded)


def test_head_that_an_adapter_adds_is_no_quantised_layer(base: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, options = base
    pairs = {f"model.layers.{n}.self_attn.q_proj": (np.eye(2, 64), 0.02 * np.ones((64, 2))) for n in range(2)}
    head = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    adapter = peft_adapter(tmp_path / "adapter", pairs, {"score.weight": head}, task_type="SEQ_CLS")
    out = tmp_path / "merged"
    lora_export.merge(folder, [adapter], out, keep_quantised=True)
    assert str(lora_export.verify(out, base=folder, adapters=[adapter])).startswith("same")
    model = AutoModelForSequenceClassification.from_pretrained(out, device_map="cpu", pad_token_id=0, **options)
    assert isinstance(model.score, torch.nn.Linear) and not isinstance(model.score, Linear4bit | Linear8bitLt)
    assert model.score.weight.dtype == torch.bfloat16  # of the model: its inputs have it
    loaded = model.score.weight.detach().float().numpy()
    np.testing.assert_array_equal(loaded, head.astype(ml_dtypes.bfloat16).astype(np.float32))
    config = out / "config.json"
    config.write_text(config.read_text().replace('"score"', '"other"'))
    assert not lora_export.verify(out, base=folder, adapters=[adapter])


def test_groups_of_4_and_8_bits_load(tmp_path: Path) -> None:
    """transformers computes with them what it does with our floats. With `dequantize=True` it reads other weights."""
    base, out = in_compressed_integers(tmp_path / "base"), tmp_path / "merged"
    sizes = {"layers.0.self_attn.q_proj": 0.02, "layers.0.mlp.down_proj": 8e-4, "layers.1.self_attn.q_proj": 8e-4}
    adapter = adapter_on(tmp_path / "adapter", sizes | {"layers.1.self_attn.o_proj": 2e-5})
    result = lora_export.merge(base, [adapter], out, keep_quantised=True)
    assert result.report is not None
    stored = {layer.weight.removeprefix("model.layers."): layer.stored for layer in result.report.layers}
    assert stored == {
        "0.self_attn.q_proj.weight": "4-bit integers",
        "0.mlp.down_proj.weight": "8-bit integers",
        "1.self_attn.o_proj.weight": "bfloat16",
        **{f"1.self_attn.{part}_proj.weight": "8-bit integers" for part in "qkv"},
    }
    before, after = weights_in(base), weights_in(out)
    for part in "kv":  # fused with q: of one type, and of the same values
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        assert np.array_equal(before[name], after[name])
    assert str(lora_export.verify(out, base=base, adapters=[adapter])).startswith("same")
    model = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    plain = AutoModelForCausalLM.from_pretrained(float_llama(tmp_path / "float"))
    floats = {name: torch.from_numpy(weight.astype(np.float32)) for name, weight in after.items()}
    missing = plain.load_state_dict(floats, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_layers_fused_with_one_that_has_no_8_bits_are_floats(tmp_path: Path) -> None:
    base, name = in_compressed_integers(tmp_path / "base"), "model.layers.1.self_attn.k_proj.weight_scale"
    stored = load_file(base / "model.safetensors")
    stored[name] = stored[name].half()
    stored[name][0, 0] = 0.0003  # a 16th of it is below the normal numbers of fp16
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    adapter = adapter_on(tmp_path / "adapter", {"layers.0.mlp.down_proj": 8e-4, "layers.1.self_attn.q_proj": 8e-4})
    result = lora_export.merge(base, [adapter], tmp_path / "merged", keep_quantised=True)
    assert result.report is not None
    found = {layer.weight.removeprefix("model.layers."): (layer.stored, layer.why) for layer in result.report.layers}
    assert found["0.mlp.down_proj.weight"][0] == "8-bit integers"
    assert {part: found[f"1.self_attn.{part}_proj.weight"][0] for part in "qkv"} == {
        "q": "bfloat16",
        "k": "float16",
        "v": "bfloat16",
    }
    assert found["1.self_attn.k_proj.weight"][1].endswith("q_proj.weight, and its scales are too small for 8 bits")


@pytest.mark.parametrize("base", ["int8", "int4", slow("nf4"), slow("fp8")], indirect=True)
def test_verify_shows_what_quantisation_costs(
    base: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = base
    adapter = adapter_on(tmp_path / "adapter", {"layers.0.self_attn.q_proj": 0.02, "layers.0.mlp.down_proj": 0.02})
    out = tmp_path / "merged"
    lora_export.merge(folder, [adapter], out, keep_quantised=True)
    result = lora_export.verify(out, folder, adapters=[adapter])
    text, figures = str(result), result.about["quantisation_error"]
    assert text.startswith("same") and f"{figures['of_rounding']:.3g} of the adapter's effect away" in text
    assert 0.001 < figures["of_rounding"] < 0.7 and 0 < figures["of_library"] < 0.5
    lora_export.merge(folder, [adapter], tmp_path / "half", keep_quantised=True, weights=[0.5], min_retention=0)
    assert str(lora_export.verify(tmp_path / "half", folder, adapters=[adapter])).startswith("different")

    def without_package(*_: object, **__: object) -> None:
        raise ImportError("Loading this model requires the package xyz\nmore")

    monkeypatch.setattr(verify_quantised, "_by_transformers", without_package)
    text = str(lora_export.verify(out, folder, adapters=[adapter]))
    assert text.startswith("same") and "what transformers computes: Loading this model requires the package xyz" in text
