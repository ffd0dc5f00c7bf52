"""A Llama in compressed-tensors becomes a float model: every weight is what transformers makes of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import lora_export
from support.handmade import peft_adapter
from support.tiny_models import tiny_llama

TARGET = "model.layers.0.self_attn.q_proj"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}


def scales_of(weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """The scales that let the largest number of each group be the largest of its format."""
    wide = weight.float()
    if kind == "float-quantized":
        return {"weight_scale": (wide.abs().amax(-1, keepdim=True) / 448).bfloat16()}
    columns = ARGUMENTS[kind]["group_size"]
    largest = wide.reshape(len(weight), -1, columns).abs().amax(-1)
    if kind == "pack-quantized":
        return {"weight_scale": (largest / 7).bfloat16()}
    whole = 448 * 6 / largest.max().reshape(1)
    return {"weight_global_scale": whole, "weight_scale": (largest / 6 * whole).to(torch.float8_e4m3fn).bfloat16()}


def compressed_llama(folder: Path, kind: str) -> Path:
    """A tiny Llama whose linear layers are compressed by the library."""
    model = tiny_llama(vocab_size=64, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    model.bfloat16().save_pretrained(folder)
    arguments = QuantizationArgs(**ARGUMENTS[kind], symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor, stored = BaseCompressor.get_value_from_registry(kind), {}
    for name, weight in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        own = {"weight": weight} | (scales_of(weight, kind) if "_proj" in name else {})
        parts = compressor.compress(own, scheme) if "_proj" in name else own
        stored |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments.model_dump(mode="json")}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_merged_model_is_the_library_s_dequantised_one(kind: str, tmp_path: Path) -> None:
    base, out = compressed_llama(tmp_path / "base", kind), tmp_path / "merged"
    rng = np.random.default_rng(0)
    adapter = peft_adapter(tmp_path / "adapter", {TARGET: (rng.normal(size=(2, 64)), rng.normal(size=(64, 2)))})
    lora_export.merge(base, [adapter], out, dequantize=True)
    scheme = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=scheme).state_dict()
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {f"{TARGET}.weight"}
    assert lora_export.verify(out, adapters=[adapter], base=base)
