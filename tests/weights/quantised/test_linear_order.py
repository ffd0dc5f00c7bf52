"""GPT-2's Conv1D, which bitsandbytes stores as an nn.Linear: the float checkpoint has the transpose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import lora_export
from lora_export.errors import InputRefused
from lora_export.weights.quantised.reading import as_conv1d
from lora_export.weights.quantised.stored_parts import Decode, QuantisedTensor
from support.handmade import peft_adapter
from support.quantised import example
from support.quantised_weights import weights_in

CONFIG = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 0}
SCHEMES = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module", params=SCHEMES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`float`, a GPT-2 in bf16; `base`, as transformers quantises and saves it; `library`, dequantised by it."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**CONFIG, eos_token_id=1)).bfloat16().save_pretrained(folder / "float")
    quantised = GPT2LMHeadModel.from_pretrained(
        folder / "float", quantization_config=SCHEMES[request.param], device_map="cpu", dtype=torch.bfloat16
    )
    quantised.save_pretrained(folder / "base")
    return folder


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.float() - other.float()).norm() <= 0.15 * other.float().norm())


def test_every_weight_of_gpt2_is_in_out_again(place: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 64)).astype(np.float32), rng.normal(size=(64, 2)).astype(np.float32)
    adapter = peft_adapter(tmp_path / "adapter", {"transformer.h.0.attn.c_proj": (a, b)})
    out = tmp_path / "merged"
    lora_export.merge(place / "base", [adapter], out, dequantize=True)
    merged, before = load_file(out / "model.safetensors"), load_file(place / "float" / "model.safetensors")
    name = "transformer.h.0.attn.c_proj.weight"
    change = torch.from_numpy(b @ a).T  # the matrix is square: no shape tells its order
    assert close(merged[name], before[name].float() + change) and not close(
        merged[name], before[name].float() + change.T
    )
    for other in before.keys() - {name}:
        assert close(merged[other], before[other]), other
    assert lora_export.verify(out, adapters=[adapter], base=place / "base")
    GPT2LMHeadModel.from_pretrained(out)


def test_conv1d_stays_quantised_in_the_order_of_the_library(place: Path, tmp_path: Path) -> None:
    rng, name = np.random.default_rng(0), "transformer.h.0.attn.c_proj"
    a, b = rng.normal(size=(2, 64)).astype(np.float32), 0.01 * rng.normal(size=(64, 2)).astype(np.float32)
    adapter, out = peft_adapter(tmp_path / "adapter", {name: (a, b)}), tmp_path / "merged"
    result = lora_export.merge(place / "base", [adapter], out, keep_quantised=True)
    assert result.report is not None and [layer.is_kept for layer in result.report.layers] == [True]
    one, other = load_file(place / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    assert [key for key in one if not torch.equal(one[key], other[key])] == [f"{name}.weight"]
    assert lora_export.verify(out, adapters=[adapter], base=place / "base")
    before, after = (weights_in(folder)[f"{name}.weight"].astype(np.float32) for folder in (place / "base", out))
    moved, change = after - before, (b @ a).T
    assert (moved * change).sum() > 0.7 * np.square(change).sum() > np.abs((moved * change.T).sum())


def test_conv1d_in_gptq_is_in_out_again(tmp_path: Path) -> None:
    stored, weight = example("gptq 4")
    base, out = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    module = "h.0.mlp.c_fc"
    save_file(
        {f"{module}.{name.removeprefix('x.')}": part for name, part in stored.items()}, base / "model.safetensors"
    )
    config = {"model_type": "gpt2", "dtype": "float16", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(config))
    outputs, inputs = weight.shape
    a, b = np.ones((1, inputs), np.float32), np.arange(outputs, dtype=np.float32)[:, None]
    adapter = peft_adapter(tmp_path / "adapter", {module: (a, b)})
    lora_export.merge(base, [adapter], out, dequantize=True)
    merged = load_file(out / "model.safetensors")[f"{module}.weight"]
    assert torch.equal(merged, (weight.float() + torch.from_numpy(b @ a)).half().T)
    assert lora_export.verify(out, adapters=[adapter], base=base)


def tensor_of(path: Path) -> QuantisedTensor:
    """A weight of 2 outputs and 3 inputs, whose packed bytes are its numbers."""

    def load() -> Decode:
        return lambda rows, packed: packed.reshape(-1, 3).astype(np.float32)

    path.write_bytes(bytes([9, 1, 2, 3, 4, 5, 6]))
    return QuantisedTensor("w", (2, 3), np.dtype(np.float32), "w", (), "nf4", load)


def test_rows_of_a_conv1d_are_columns_of_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    tensor = as_conv1d(tensor_of(path), 6, True, True)
    assert (tensor.shape, tensor.rows_at_once) == ((3, 2), 3)
    with path.open("rb") as file:
        assert tensor.read(path, file.fileno(), 1, 6, slice(1, 3)).tolist() == [[2, 5], [3, 6]]


def test_other_weights_stay_as_they_are_and_doubts_are_refused(tmp_path: Path) -> None:
    tensor = tensor_of(tmp_path / "bytes")
    assert as_conv1d(tensor, 6, False, True) is tensor
    for is_conv1d, is_stored_as_linear in [(None, True), (True, False)]:
        with pytest.raises(InputRefused, match="w: this module may be a Conv1D, and how nf4 stores its"):
            as_conv1d(tensor, 6, is_conv1d, is_stored_as_linear)
