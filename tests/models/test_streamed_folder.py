"""Folders whose weights are read when something computes with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lora_export.errors import InputRefused
from lora_export.models import stored_parameter
from lora_export.models.load import load_model, module_with_weights
from lora_export.models.stored_parameter import StoredParameter, state_of
from lora_export.runtime.torch_runners import ModuleRunner

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"input_ids": np.array([[1, 2, 3, 4], [5, 6, 7, 8]])}


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a large one."""
    monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", 0)
    monkeypatch.setattr(stored_parameter, "SMALLEST_STREAMED", 0)


def a_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2))
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied"))


def a_folder(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    a_model(kind).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "mixtral"])
def test_streamed_model_is_the_whole_one(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "m", kind, dtype)
    whole, read = load_model(str(folder)), load_model(str(folder), streamed=True)
    is_streamed = any(isinstance(tensor, StoredParameter) for tensor in read.module.parameters())
    assert is_streamed == (kind != "mixtral")  # whose experts transformers stacks
    assert read.fingerprint() == whole.fingerprint()
    assert len(list(read.module.parameters())) == len(list(whole.module.parameters()))  # tied tensors stay tied
    for name, tensor in whole.module.named_buffers():
        assert torch.equal(read.module.get_buffer(name), tensor)
    expected, found = ModuleRunner(whole.module).run(IDS), ModuleRunner(read.module).run(IDS)
    assert found["logits"].dtype == np.float32
    assert (found["logits"] == expected["logits"]).all()


def test_small_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_folder(tmp_path / "m", "llama", torch.float32)
    monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", 1 << 30)
    assert not any(
        isinstance(each, StoredParameter) for each in load_model(str(folder), streamed=True).module.parameters()
    )


def test_turned_weight_is_not_taken_for_the_stored_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square matrix that the loading transposes has the same shape: the model is loaded whole."""
    folder = a_folder(tmp_path / "m", "llama", torch.float32)
    load = LlamaForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def turning(cls: type, *args: object, **kwargs: object) -> object:
        module, loading = load(cls, *args, **kwargs)
        weight = module.model.layers[0].self_attn.q_proj
        weight.weight = nn.Parameter(weight.weight.detach().T, requires_grad=False)
        return module, loading

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(turning))
    read = load_model(str(folder), streamed=True).module
    assert not any(isinstance(tensor, StoredParameter) for tensor in read.parameters())
    own = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(read.get_parameter("model.layers.0.self_attn.q_proj.weight"), own.T)


def test_file_that_changes_is_refused(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "m", "llama", torch.float32)
    module = load_model(str(folder), streamed=True).module
    path = folder / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(InputRefused, match="changed while the model was in use"):
        ModuleRunner(module).run(IDS)


def test_weights_of_a_file_are_streamed_beside_a_streamed_model(tmp_path: Path) -> None:
    base = load_model(str(a_folder(tmp_path / "m", "llama", torch.float32)), streamed=True)
    weights = {name: (tensor * 2).bfloat16() for name, tensor in load_file(tmp_path / "m/model.safetensors").items()}
    save_file(weights, tmp_path / "w.safetensors")
    made = state_of(module_with_weights(base, tmp_path / "w.safetensors"))
    assert made.keys() == weights.keys()
    assert all(isinstance(tensor, StoredParameter) for tensor in made.values())
    assert all(torch.equal(made[name].detach(), tensor.float()) for name, tensor in weights.items())


@pytest.mark.parametrize("fault", ["lacks", "more", "shape"])
def test_file_that_does_not_fit_a_streamed_model_is_refused(fault: str, tmp_path: Path) -> None:
    base = load_model(str(a_folder(tmp_path / "m", "llama", torch.float32)), streamed=True)
    weights = load_file(tmp_path / "m/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "lacks":
        del weights[name]
    elif fault == "more":
        weights["model.more"] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(3, 4)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(InputRefused, match="model.more" if fault == "more" else name):
        module_with_weights(base, tmp_path / "w.safetensors")
